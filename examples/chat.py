"""Talk with a saved model about images, in a terminal.

    python examples/chat.py --model runs/quickstart/model
    python examples/chat.py --model runs/quickstart/model --image photo.jpg "What colour is the shape at the top left?"

With a question it answers that and ends; without one it goes on talking. An image may be a path or a URL, and a file that is
dragged into the terminal is understood as well. Ctrl-C stops an answer, Ctrl-D leaves.

A model of another kind than MiniMind-V brings its own code, which is run: talk with models that you trust.
"""

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
from pathlib import Path
from urllib.parse import unquote

import torch
from transformers import TextStreamer

from minimind_v_hf.chat import PRECISIONS, Answer, Conversation, load_model, media_kind, url_path
from minimind_v_hf.scripts import errors_in_one_line


HELP = """\
/image PATH or URL   show an image; several may be given. A path inside a question, or dragged here, does the same
/video PATH or URL   show a video: one frame a second, at most 64
/reset               forget all messages and images
/help                this
/quit, or Ctrl-D     leave
Ctrl-C               stop the answer"""

LIMITS = [
    ("max_new_tokens", 1, 1_000_000),
    ("temperature", 0.01, 100),
    ("top_p", 0.01, 1),
    ("top_k", 0, 1_000_000),
    ("repetition_penalty", 0.01, 100),
    ("seed", 0, 2**63 - 1),
]

# A quoted stretch, or a word in which a backslash escapes a blank: what terminals write for a dragged file
WORD = re.compile(r"""'[^']*'|"[^"]*"|(?:\\.|[^\s\\])+""" if os.name == "posix" else r"""'[^']*'|"[^"]*"|\S+""")


def as_source(word: str) -> str:
    """A path or URL as a terminal writes it: without quotes, escapes and file://."""
    if len(word) > 1 and word[0] == word[-1] and word[0] in "'\"":
        word = word[1:-1]
    elif os.name == "posix" and not word.startswith(("http://", "https://")):
        word = re.sub(r"\\(.)", r"\1", word)
    if word.startswith("file://"):
        word = unquote(url_path(word))
    return os.path.expanduser(word)


def split_line(line: str) -> tuple[str, list[tuple[str, str]]]:
    """A line as typed, to the question and its (kind, path or URL) of images and videos, in order."""
    media, text, end = [], "", 0
    for match in WORD.finditer(line):
        source = as_source(match.group())
        kind = media_kind(source)
        if kind is not None:
            media.append((kind, source))
            text += line[end : match.start()]
            end = match.end()
    return (text + line[end:]).strip(), media


def attach(conversation: Conversation, kind: str, source: str) -> bool:
    """Show the model an image or a video; False, with the reason on the screen, when it cannot be read."""
    try:
        count = conversation.attach(**{kind: source})
    except (ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return False
    print(f"[{Path(source).name}: {f'{count} frames' if kind == 'video' else 'an image'}]", file=sys.stderr)
    return True


def answer(conversation: Conversation, question: str, **options) -> Answer | None:
    """Print the answer as it is written, until its end or Ctrl-C. None, with the reason on the screen, when there is none."""
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        streamer = TextStreamer(conversation.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        result = conversation.ask(question, streamer=streamer, stop=stop, **options)
    except ValueError as error:
        conversation.detach()
        print(error, file=sys.stderr)
        return None
    finally:
        signal.signal(signal.SIGINT, before)
    rate = f", {result.tokens_per_second:.0f} tokens/s" if result.tokens > 1 else ""
    stopped = ", stopped" if result.stopped else ""
    print(f"[{result.tokens} tokens, the first after {result.first_token_seconds:.2f} s{rate}{stopped}]", file=sys.stderr)
    return result


def talk(conversation: Conversation, **options) -> None:
    """Read questions and commands until the end of the input."""
    with contextlib.suppress(ImportError):  # not everywhere; it makes the line editable
        import readline  # noqa: F401
    print("Ask something, or show an image: /help tells how.", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves.)", file=sys.stderr)
            continue
        if line.partition(" ")[0] in ("/quit", "/exit"):
            return
        try:
            obey(line, conversation, **options)
        except KeyboardInterrupt:  # while an image or a video was read
            conversation.detach()
            print("\n[stopped: no image waits for a question]", file=sys.stderr)


def obey(line: str, conversation: Conversation, **options) -> None:
    """Follow a command, or put a question with the images that it names."""
    command, _, rest = line.partition(" ")
    if command == "/help":
        print(HELP, file=sys.stderr)
    elif command == "/reset":
        conversation.reset()
        print("[a new conversation]", file=sys.stderr)
    elif command in ("/image", "/video"):
        words = WORD.findall(rest)
        if not words:
            print(f"{command} needs a path or a URL.", file=sys.stderr)
        for word in words:
            attach(conversation, command[1:], as_source(word))
    else:
        question, media = split_line(line)
        if not media and re.fullmatch(r"/[a-z]+", command):
            print(f"There is no {command}: /help lists what there is.", file=sys.stderr)
        elif not all(attach(conversation, kind, source) for kind, source in media):
            conversation.detach()
            print("So the question was not put, and no image waits for one.", file=sys.stderr)
        elif question:
            answer(conversation, question, **options)


@errors_in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", help="what to ask; without it the talk goes on until Ctrl-D")
    parser.add_argument("--model", required=True, help="folder or Hub id of a saved model")
    parser.add_argument("--image", action="append", default=[], help="path or URL of an image; may be given several times")
    parser.add_argument("--video", action="append", default=[], help="path or URL of a video: one frame a second, at most 64")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest token (default)")
    parser.add_argument("--top-p", type=float, help="with a temperature: sample among the likeliest of this share (0.9)")
    parser.add_argument("--top-k", type=int, help="with a temperature: sample among so many tokens; 0, the default, among all")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1, repeats less (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="makes sampled answers repeatable")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of the weights. auto, the default, is bfloat16 where the machine has it in hardware, else float32; of a folder "
        "that convert/to_onnx.py wrote, what the export found best",
    )
    arguments = parser.parse_args()
    options = {"max_new_tokens": arguments.max_new_tokens, "repetition_penalty": arguments.repetition_penalty}
    if arguments.temperature:
        options |= {"do_sample": True, "temperature": arguments.temperature}
        options["top_p"] = 0.9 if arguments.top_p is None else arguments.top_p
        options["top_k"] = arguments.top_k or 0
    elif arguments.top_p is not None or arguments.top_k is not None:
        parser.error("--top-p and --top-k are for sampling: give a --temperature too")
    for name, low, high in LIMITS:
        value = {**options, "seed": arguments.seed}.get(name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} {value}: expected {low} to {high}")
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)

    conversation = Conversation(*load_model(arguments.model, arguments.precision), system=arguments.system)
    media = [("image", source) for source in arguments.image] + [("video", source) for source in arguments.video]
    if not all(attach(conversation, kind, source) for kind, source in media):
        sys.exit(2)
    if arguments.question is None:
        talk(conversation, **options)
    elif answer(conversation, arguments.question, **options) is None:
        sys.exit(2)


if __name__ == "__main__":
    main()
