"""Talking with a model: the cache changes nothing but the time, and the terminal understands what people type."""

import json
import os
import select
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
from safetensors.torch import load_file, save_file
from transformers import TextIteratorStreamer, TrainingArguments

from minimind_v_hf.chat import Conversation, answer_questions, encode_questions, load_model
from minimind_v_hf.training import RunArguments, load_start


CHAT = Path(__file__).parents[1] / "examples" / "chat.py"
EXTRAS = {"attention_map.py": "matplotlib", "web_demo.py": "gradio"}


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


def test_a_batch_of_questions_has_the_answers_of_each_alone(model):
    processor = make_processor()
    questions = [[{"role": "user", "content": text}] for text in ("<image>\nWhat colour?", "Two?", "<image><image>图中")]
    images = [[make_image()], [], [make_image("blue"), make_image("green")]]
    model.train()
    together = answer_questions(model, processor, encode_questions(processor, questions, images), max_new_tokens=9)
    assert model.training
    model.eval()
    for question, shown, answer in zip(questions, images, together, strict=True):
        content = [{"type": "image", "image": image} for image in shown]
        content.append({"type": "text", "text": question[0]["content"].replace("<image>", "")})
        assert answer == without_cache(model, processor, [{"role": "user", "content": content}], 9).strip()


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
    with pytest.raises(ValueError, match="192: shorten the question, or start a new conversation"):
        conversation.ask("What now? " * 100)  # the images are not to blame
    assert conversation.ask("Hm", max_new_tokens=500).tokens < 192


def spoil_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


NORM = "model.language_model.norm.weight"
SPOILED = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "cut weights": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000]),
        "model.safetensors is damaged",
    ),
    "garbage": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 500), "model.safetensors is damaged"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
    "other weights": (
        lambda folder: save_file({"a": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"}),
        "no weights for lm_head.weight, model.language_model.embed_tokens.weight, .* more",
    ),
    "one weight less": (
        lambda folder: spoil_weights(folder, lambda weights: weights.pop(NORM)),
        "no weights for model.language_model.norm.weight. ",
    ),
    "another shape": (
        lambda folder: spoil_weights(
            folder, lambda weights: weights.update({"model.language_model.norm.weight": torch.ones(7)})
        ),
        r"weights of other shapes than its config says: model.language_model.norm.weight is \(7,\), expected \(32,\)",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "the folder has no config.json"),
    "null as config": (lambda folder: (folder / "config.json").write_text("null"), "config.json is damaged"),
    "half a config": (lambda folder: (folder / "config.json").write_text('{"model_type"'), "config.json is damaged"),
    "a word as token id": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": [2, "end"]}'),
        r"generation_config.json has eos_token_id=\[2, 'end'\], where token ids were expected",
    ),
    "half a tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json is damaged"),
    "bad template": (lambda folder: (folder / "chat_template.jinja").write_text("{% garbage"), "unknown tag 'garbage'"),
}


@pytest.mark.parametrize(("spoil", "reason"), SPOILED.values(), ids=SPOILED)
def test_a_damaged_folder_is_refused_in_one_line(tmp_path, capfd, spoil, reason):
    make_model().save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    spoil(tmp_path / "model")
    capfd.readouterr()
    with pytest.raises(ValueError, match=f"^Cannot load the model .*: .*{reason}") as error:
        load_model(tmp_path / "model")
    assert "\n" not in str(error.value)
    assert "MISSING" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "a/b/nowhere", "runs/nowhere", "~/nowhere", "nowhere/"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(ValueError, match="there is no such folder"):
        load_model(name)


def test_a_tied_head_is_no_missing_weight(tmp_path):
    make_model({"tie_word_embeddings": True}).save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model, _ = load_model(tmp_path)
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("script", ["chat.py", "evaluate.py", "attention_map.py", "web_demo.py"])
def test_every_example_refuses_a_folder_without_its_weights(tmp_path, script):
    if script in EXTRAS:
        pytest.importorskip(EXTRAS[script])
    make_model().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "data.jsonl").write_text(
        '{"conversations": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}]}'
    )
    options = {
        "chat.py": ["What?"],
        "evaluate.py": ["--data", "data.jsonl", "--images", ".", "--output", "answers.jsonl"],
        "attention_map.py": ["--image", "a.png", "What?"],
        "web_demo.py": [],
    }
    command = [sys.executable, str(CHAT.with_name(script)), "--model", ".", *options[script]]
    environment = os.environ | {"PYTHONPATH": str(CHAT.parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{script}: error: Cannot load the model '.': it has no weights for lm_head.weight")
    assert "Traceback" not in done.stderr


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
    image = f"'{folder / 'red one.png'}'"
    lines = ["/help", f"/image {image}", "What colour?", f"And now? {image}", "/image nowhere.png", "/nothing"]
    out, log = process.communicate("\n".join([*lines, "/reset", "Hello", "/quit", "never read"]), timeout=300)
    assert process.returncode == 0, log
    assert out
    assert log.count("[red one.png: an image]") == 2
    assert log.count("[5 tokens, the first after") == 3
    assert log.count("tokens/s]") == 3
    for words in ("/video PATH", "there is no such file", "There is no /nothing", "[a new conversation]"):
        assert words in log


def test_ctrl_c_stops_the_answer_and_not_the_program(folder):
    process = start(folder, "--max-new-tokens", "90000")
    process.stdin.write("Talk\n")
    process.stdin.flush()
    assert select.select([process.stdout], [], [], 120)[0], "no answer within two minutes"
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
        connection, _ = silent.accept()
        connection.recv(100)
        process.send_signal(signal.SIGINT)
        process.stdin.buffer.write(b"Is \xff\xfe text?\n")
        _, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    assert "[stopped: no image waits for a question]" in log
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


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (
            lambda state: state | {"model.stray.weight": torch.zeros(2)},
            "weights that its config has no use for: model.stray.weight",
        ),
        (
            lambda state: {name: weight * float("nan") if "o_proj" in name else weight for name, weight in state.items()},
            "NaN or infinite values in model.language_model.layers.0.self_attn.o_proj.weight",
        ),
    ],
)
def test_weights_that_are_left_over_or_not_finite_are_refused(spoil, problem, tmp_path):
    make_model().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    save_file(spoil(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=problem):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=problem):
        load_start(RunArguments(model=str(tmp_path)), TrainingArguments())


def test_fewer_layers_in_the_config_than_in_the_weights_are_refused(tmp_path):
    make_model().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no use for: model.language_model.layers.1"):
        load_model(tmp_path)
