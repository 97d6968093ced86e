"""Talking with a model: the cache changes nothing but the time, and the terminal understands what people type."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from chat import main, split_line
from conftest import MOE, make_image, make_model, make_processor
from transformers import TextIteratorStreamer

from minimind_v_hf.chat import Conversation


CHAT = Path(__file__).parents[1] / "examples" / "chat.py"


@pytest.fixture(scope="module", params=[None, MOE], ids=["dense", "moe"])
def model(request):
    torch.manual_seed(3)
    return make_model(request.param)


def without_cache(model, processor, messages, max_new_tokens):
    """The answer to a whole conversation, read from its start."""
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, use_cache=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_conversation_has_the_answers_of_one_without_a_cache(model):
    processor = make_processor()
    encoded = []
    hook = model.model.vision_tower.register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
    conversation, messages, prompt_tokens = Conversation(model, processor), [], 0
    turns = [
        ([], "Hello"),
        (["red", "blue"], "What colour?"),
        ([], "图中有几个图形？"),
        (["green"], "And <image>?"),
        ([], "Sure?"),
    ]
    for colours, question in turns:
        for colour in colours:
            assert conversation.attach(image=make_image(colour)) == 1
        encoded.clear()
        answer = conversation.ask(question, max_new_tokens=9)
        assert sum(encoded) == answer.new_images == len(colours)
        content = [{"type": "image", "image": make_image(colour)} for colour in colours]
        content.append({"type": "text", "text": ("\n" if content else "") + question})
        messages.append({"role": "user", "content": content})
        assert answer.text == without_cache(model, processor, messages, 9)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer.text}]})
        # All that was read before is kept; of an answer, as much as its text gives the same tokens
        assert answer.cached_tokens >= prompt_tokens
        prompt_tokens = answer.cached_tokens + answer.new_tokens
    hook.remove()

    conversation.reset()
    again = conversation.ask("Hello", max_new_tokens=9)
    assert (again.text, again.cached_tokens) == (messages[1]["content"][0]["text"], 0)


def test_an_answer_can_be_stopped_and_the_conversation_goes_on(processor):
    torch.manual_seed(3)
    model = make_model()
    conversation, stop = Conversation(model, processor), threading.Event()
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=lambda: answers.append(
            conversation.ask("Go on", max_new_tokens=400, streamer=streamer, stop=stop, eos_token_id=-1, pad_token_id=0)
        )
    )
    answers = []
    thread.start()
    next(iter(streamer))
    stop.set()
    thread.join()
    (stopped,) = answers
    assert stopped.stopped
    assert 0 < stopped.tokens < 400
    messages = [*conversation.messages, {"role": "user", "content": "More"}]
    assert conversation.ask("More", max_new_tokens=6).text == without_cache(model, processor, messages, 6)


def test_a_conversation_that_is_too_long_stays_as_it_was(processor):
    conversation = Conversation(make_model({"max_position_embeddings": 192}), processor)
    conversation.ask("Hi", max_new_tokens=2)
    before = list(conversation.messages)
    for _ in range(8):
        conversation.attach(image=make_image())
    with pytest.raises(ValueError, match=r"grown to \d+ tokens, and this model has positions for 192"):
        conversation.ask("What now?")
    assert conversation.messages == before
    conversation.detach()
    assert conversation.ask("Hm", max_new_tokens=500).tokens < 192


def test_lines_as_people_type_and_terminals_paste_them(tmp_path):
    plain, blank, clip = tmp_path / "a.png", tmp_path / "it's a b.jpg", tmp_path / "c.mp4"
    for path in (plain, blank, clip):
        path.touch()
    escaped = str(blank).replace(" ", r"\ ").replace("'", r"\'")
    cases = {
        "What's the dog's colour?": ("What's the dog's colour?", []),
        f"{plain} What is it?": ("What is it?", [("image", str(plain))]),
        f'What is in "{blank}"': ("What is in", [("image", str(blank))]),
        f"{escaped} '{clip}'": ("", [("image", str(blank)), ("video", str(clip))]),
        blank.as_uri(): ("", [("image", str(blank))]),
        "https://example.org/x.JPG?size=2 who?": ("who?", [("image", "https://example.org/x.JPG?size=2")]),
        "see https://example.org/ and nowhere.jpg": ("see https://example.org/ and nowhere.jpg", []),
        "左上的图形是什么颜色？": ("左上的图形是什么颜色？", []),
        "two\\": ("two\\", []),
        "look http://[bad/a.jpg file://[x/a.jpg": ("look http://[bad/a.jpg file://[x/a.jpg", []),
    }
    for line, expected in cases.items():
        assert split_line(line) == expected, line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat")
    torch.manual_seed(3)
    model = make_model({"max_position_embeddings": 100_000})
    model.generation_config.eos_token_id = None  # it talks until it is stopped
    model.save_pretrained(path / "model")
    make_processor().save_pretrained(path / "model")
    make_image().save(path / "red one.png")
    return path


def start(folder, *arguments):
    command = [sys.executable, "-u", str(CHAT), "--model", str(folder / "model"), *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True, env=environment, start_new_session=True)


def test_a_talk_in_a_terminal(folder):
    process = start(folder, "--max-new-tokens", "5")
    picture = f"'{folder / 'red one.png'}'"
    lines = ["/help", f"/image {picture}", "What colour?", f"And now? {picture}", "/image nowhere.png", "/nothing"]
    out, log = process.communicate("\n".join([*lines, "/reset", "Hello", "/quit", "never read"]), timeout=300)
    assert process.returncode == 0, log
    assert out
    assert log.count("[red one.png: a picture]") == 2
    assert log.count("[5 tokens, the first after") == 3
    assert log.count("tokens/s]") == 3
    for words in ("/video PATH", "there is no such file", "There is no /nothing", "[a new conversation]"):
        assert words in log


def test_ctrl_c_stops_the_answer_and_not_the_program(folder):
    process = start(folder, "--max-new-tokens", "90000")
    process.stdin.write("Talk\n")
    process.stdin.flush()
    process.stdout.read(20)  # it talks
    process.send_signal(signal.SIGINT)
    # Both pipes are read, lest the program wait for its reader
    threading.Thread(target=process.stdout.read, daemon=True).start()
    line = ""
    deadline = time.monotonic() + 300
    while "stopped" not in line and time.monotonic() < deadline:
        line = process.stderr.readline()
    assert "tokens/s, stopped]" in line
    process.stdin.write("/help\n")
    process.stdin.close()
    assert "Ctrl-C" in process.stderr.read()
    assert process.wait(60) == 0


def test_ctrl_c_stops_a_download_and_not_the_program(folder):
    process = start(folder, "--max-new-tokens", "3")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the request, and never answers
        process.stdin.write(f"/image http://127.0.0.1:{silent.getsockname()[1]}/a.png\n")
        process.stdin.flush()
        silent.accept()[0].recv(100)
        process.send_signal(signal.SIGINT)
        process.stdin.buffer.write(b"Is \xff\xfe text?\n")
        _, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    assert "[stopped: no picture waits for a question]" in log
    assert "[3 tokens, the first after" in log  # and it goes on, also with what is no text


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--temperature", "-1"], "--temperature -1.0: expected 0.01 to 100"),
        (["--temperature", "nan"], "--temperature nan: expected 0.01 to 100"),
        (["--top-k", "5"], "--top-p and --top-k are for sampling: give a --temperature too"),
        (["--temperature", "1", "--top-p", "2"], "--top-p 2.0: expected 0.01 to 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: expected 1 to 1000000"),
        (["--seed", "-1"], "--seed -1: expected 0 to 9223372036854775807"),
        ([], "Cannot load the model 'nowhere': there is no such folder"),
    ],
)
def test_wrong_options_are_one_line(monkeypatch, capsys, options, error):
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model", "nowhere", *options])
    with pytest.raises(SystemExit):
        main()
    assert error in capsys.readouterr().err


def test_sampling_is_random_and_repeatable(processor):
    torch.manual_seed(3)
    conversation, drawn = Conversation(make_model(), processor), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        conversation.reset()
        conversation.attach(image=make_image())
        drawn.append(conversation.ask("What?", max_new_tokens=12, do_sample=True, temperature=2.0, top_k=50).text)
    assert drawn[0] == drawn[1] != drawn[2]
