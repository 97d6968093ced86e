"""Talk with saved models about images, in a browser, in English or Chinese as the browser is.

    python examples/web_demo.py --model runs/quickstart/model

Several models may be given, to choose among on the page. Needs gradio (`pip install -e ".[demo]"`), and PyAV for videos
(`".[demo,video]"`). The page is for this machine alone unless `--host 0.0.0.0` opens it to others. A folder's own code is run,
unless the package minimind_v_hf is installed.
"""

import argparse
import copy
import functools
import random
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TextIteratorStreamer

from minimind_v_hf.chat import Conversation, load_model, media_kind
from minimind_v_hf.scripts import errors_in_one_line
from minimind_v_hf.shapes import all_scenes, draw, questions


try:
    import gradio as gr
except ImportError:  # main() says so; --help works without it
    gr = None

TEXTS = {
    "en": {
        "intro": "### Ask about an image\nAdd one, or try an example:",
        "ask": "Ask; add images or a video",
        "model": "Model",
        "new": "New conversation",
        "options": "Sampling",
        "temperature": "Temperature (0: greedy)",
        "top_p": "Top-p",
        "top_k": "Top-k (0: off)",
        "penalty": "Repetition penalty",
        "length": "Longest answer, in tokens",
        "status": "{tokens} tokens · {speed:.0f} tokens/s",
        "unreadable": "This file cannot be read: {name} ({reason})",
        "failed": "No answer: {reason}",
    },
    "zh": {
        "intro": "### 看图问答\n添加一张图片并提问，或者试试：",
        "ask": "请提问；可添加图片或视频",
        "model": "模型",
        "new": "新对话",
        "options": "采样设置",
        "temperature": "温度（0：贪心）",
        "top_p": "Top-p",
        "top_k": "Top-k（0：不限）",
        "penalty": "重复惩罚",
        "length": "回答的最大长度（token 数）",
        "status": "{tokens} 个 token · 每秒 {speed:.0f} 个",
        "unreadable": "无法读取这个文件：{name}",
        "failed": "无法回答：问题太长，或对话已超出模型的长度。请缩短问题，或开始新对话。",
    },
}

CSS = """
.gradio-container { width: 100%; max-width: 900px !important; margin: auto !important; }
.gradio-container .main.fillable { padding: 8px !important; }
.gradio-container main { padding: 4px !important; }
#top { align-items: center; flex-wrap: nowrap; }
#title h1 { margin: 0; }
#chat .placeholder-content { justify-content: center; }
#chat .placeholder { flex-grow: 0; height: auto; text-align: center; }
#chat .examples { margin: 0 auto; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); }
#chat .example { padding: 12px; border: 1px solid var(--border-color-primary); }
#chat .example-image-container { width: 64px; height: 64px; }
#chat .message img { height: 128px; width: auto; object-fit: contain; }
#chat .message-wrap * { overflow-wrap: anywhere; }
#chat .message-buttons-right, #chat .wrapper > .icon-button-wrapper { display: none; }
.toast-title-row { visibility: hidden; } /* it would say "Warning" in every language */
"""


class Talk:
    """What one visitor has going on: a question that waits, a conversation, and the wish to stop an answer."""

    def __init__(self):
        self.message: dict[str, Any] | None = None
        self.busy = False
        self.model: str | None = None
        self.conversation: Conversation | None = None
        self.stop = threading.Event()


def take(message: dict[str, Any], talk: Talk | None) -> tuple:
    """Take the question out of the text box at once, so that a slow machine does not clear what is typed next.

    While an answer is being written, and without a question, the box keeps what it has.
    """
    talk = talk or Talk()
    if talk.busy or not (message.get("text") or "").strip():
        return talk, gr.update()
    # Half a surrogate pair is no text, and could not be sent back to the browser
    talk.message, talk.busy = {**message, "text": message["text"].encode(errors="replace").decode()}, True
    talk.stop.clear()
    return talk, gr.update(value=None, submit_btn=False, stop_btn=True)


def say(request: "gr.Request | None", text: str, **values: Any) -> str:
    """A text in the language of the visitor's browser."""
    languages = request.headers.get("accept-language", "") if request is not None else ""
    return TEXTS["zh" if languages.lower().startswith("zh") else "en"][text].format(**values)


def respond(
    talk: Talk,
    history: list[dict],
    model: str,
    temperature: float,
    top_p: float,
    top_k: int,
    penalty: float,
    length: int,
    request: "gr.Request | None" = None,
) -> Iterator[tuple]:
    """Answer the question that waits, piece by piece. Yields the history, the text box and the status.

    A notice tells what went wrong, and the question goes back into the box, without the file that cannot be read.
    """
    message, talk.message = talk.message, None
    if message is None:
        yield gr.update(), gr.update(), gr.update()
        return
    try:
        yield from _respond(message, talk, history, model, temperature, top_p, top_k, penalty, length, request)
    except (ValueError, OSError, ImportError) as error:
        if talk.conversation is not None:
            talk.conversation.detach()
        file, reason = getattr(error, "file", None), str(error)
        if file is None:
            gr.Warning(say(request, "failed", reason=reason))
        else:
            # The path is this machine's and says nothing to the visitor
            reason = reason.removeprefix(f"Cannot read the {media_kind(file) or 'image'} ({file}): ")
            gr.Warning(say(request, "unreadable", name=Path(file).name, reason=reason.rstrip(".")))
            message = {**message, "files": [other for other in message["files"] if other != file]}
        yield history, gr.update(value=message, submit_btn=True, stop_btn=False), ""
    finally:
        talk.busy = False


def _respond(message, talk, history, model, temperature, top_p, top_k, penalty, length, request) -> Iterator[tuple]:
    question, files = message["text"].strip(), message.get("files") or []
    if talk.conversation is None or talk.model != model:
        talk.model, talk.conversation = model, Conversation(*load_once(model))
    conversation = talk.conversation
    for file in files:
        try:
            conversation.attach(**{media_kind(file) or "image": file})
        except (ValueError, ImportError) as error:
            error.file = file  # type: ignore[union-attr]
            raise
    shown = [{"role": "user", "content": {"path": file}} for file in files]
    history = [*history, *shown, {"role": "user", "content": question}]
    yield history, gr.update(), ""

    options: dict[str, Any] = {"max_new_tokens": int(length), "repetition_penalty": float(penalty)}  # sliders send integers

    if temperature > 0:
        options |= {"do_sample": True, "temperature": float(temperature), "top_p": float(top_p), "top_k": int(top_k)}
    streamer = TextIteratorStreamer(conversation.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(conversation.ask(question, streamer=streamer, stop=talk.stop, **options))
        except Exception as error:
            outcome.append(error)  # raised again below
            streamer.end()

    thread = threading.Thread(target=work)
    thread.start()
    text = ""
    try:
        for piece in streamer:
            text += piece
            yield [*history, {"role": "assistant", "content": text}], gr.update(), ""
    finally:
        talk.stop.set()  # the visitor may have left
        thread.join()
    (result,) = outcome
    if isinstance(result, Exception):
        raise result
    status = say(request, "status", tokens=result.tokens, speed=result.tokens_per_second)
    yield [*history, {"role": "assistant", "content": text or "…"}], gr.update(submit_btn=True, stop_btn=False), status


def forget(talk: Talk | None) -> tuple:
    """Stop the answer and begin anew, with the model that is chosen then."""
    if talk is not None:
        talk.stop.set()
    return [], Talk(), gr.update(value=None, submit_btn=True, stop_btn=False), ""


@functools.cache
def load_once(folder: str):
    return load_model(folder, "auto")


def draw_examples(folder: Path) -> list[dict[str, Any]]:
    """Questions about images of coloured shapes, which are drawn into a folder."""
    rng = random.Random(5)
    scenes = (scene for scene in rng.sample(all_scenes(), 50) if sum(thing is not None for thing in scene) == 3)
    asked = ["How many shapes are there?", "左上的图形是什么颜色？", "Which shape is at the bottom right?", "图中有几个图形？"]
    examples = []
    for number, question in enumerate(asked):
        scene = next(scene for scene in scenes if any(question in other.text for other in questions(scene)))
        path = folder / f"shapes-{number}.png"
        draw(scene, rng).save(path)
        examples.append({"text": question, "files": [str(path)]})
    return examples


def build(models: list[str], examples: list[dict[str, Any]], texts: "gr.I18n") -> "gr.Blocks":
    """The page."""
    with gr.Blocks(title="MiniMind-V", analytics_enabled=False, fill_height=True, fill_width=True) as page:
        talk = gr.State(None)
        with gr.Row(elem_id="top"):
            gr.Markdown("# MiniMind-V", elem_id="title")
            new = gr.Button(texts("new"), size="sm", elem_id="new", scale=0, min_width=140)
        model = gr.Dropdown(
            models, value=models[0], label=texts("model"), container=False, visible=len(models) > 1, elem_id="model"
        )
        chatbot = gr.Chatbot(
            show_label=False,
            placeholder=texts("intro"),
            examples=copy.deepcopy(examples),  # the component turns the files' names into records
            buttons=[],
            feedback_options=None,
            allow_tags=False,
            scale=1,
            elem_id="chat",
        )
        box = gr.MultimodalTextbox(
            show_label=False,
            placeholder=texts("ask"),
            file_types=["image", "video"],
            file_count="multiple",
            sources=["upload"],
            max_lines=5,
            autofocus=True,
            elem_id="box",
        )
        status = gr.Markdown("", elem_id="status")
        with gr.Accordion(texts("options"), open=False, elem_id="options"), gr.Row():
            temperature = gr.Slider(0, 2, 0, step=0.05, label=texts("temperature"), min_width=240)
            top_p = gr.Slider(0.05, 1, 0.9, step=0.05, label=texts("top_p"), min_width=240)
            top_k = gr.Slider(0, 200, 0, step=1, label=texts("top_k"), min_width=240)
            penalty = gr.Slider(1, 2, 1, step=0.05, label=texts("penalty"), min_width=240)
            length = gr.Slider(1, 2048, 256, step=1, label=texts("length"), min_width=240)

        def take_example(talk: Talk | None, chosen: gr.SelectData) -> tuple:
            return take(examples[chosen.index], talk)

        asked = [
            box.submit(take, [box, talk], [talk, box], queue=False, api_visibility="private"),
            chatbot.example_select(take_example, talk, [talk, box], queue=False, api_visibility="private"),
        ]
        answered = [
            event.then(
                respond,
                [talk, chatbot, model, temperature, top_p, top_k, penalty, length],
                [chatbot, box, status],
                api_visibility="private",
            )
            for event in asked
        ]
        box.stop(lambda talk: talk and talk.stop.set(), talk, queue=False, api_visibility="private")
        for trigger in (new.click, model.change):
            trigger(forget, talk, [chatbot, talk, box, status], cancels=answered, queue=False, api_visibility="private")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", required=True, help="folder or Hub id; several may be given, to choose among"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at (default: %(default)s)")
    arguments = parser.parse_args()
    if gr is None:
        parser.exit(2, 'web_demo.py: error: the web page needs gradio: pip install -e ".[demo]"\n')
    with errors_in_one_line():  # a wrong folder shows now, and no visitor waits
        for folder in arguments.model:
            load_once(folder)
    texts = gr.I18n(**TEXTS)
    with tempfile.TemporaryDirectory() as examples:
        page = build(arguments.model, draw_examples(Path(examples)), texts)
        try:
            page.launch(
                server_name=arguments.host,
                server_port=arguments.port,
                allowed_paths=[examples],
                i18n=texts,
                css=CSS,
                theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
                footer_links=[],
                max_file_size="512mb",
            )
        except (OSError, OverflowError):  # the latter for a port that cannot be
            where = f"{arguments.host}:{arguments.port}"
            parser.exit(2, f"web_demo.py: error: cannot listen at {where}: choose another --host or --port\n")


if __name__ == "__main__":
    main()
