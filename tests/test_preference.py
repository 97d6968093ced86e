"""Training by reward and by preference: what TRL is given, and the two scripts as a user runs them."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_image, make_model, make_processor
from transformers import AutoModelForImageTextToText, AutoProcessor

from minimind_v_hf.measures import presence_questions
from minimind_v_hf.shapes import write_presence_set
from minimind_v_hf.training.questions import ask, load, prompts, read_questions


def message(role, content):
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, its images, and rows in each of which two questions are answered."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    make_model().save_pretrained(folder / "start")
    make_processor().save_pretrained(folder / "start")
    (folder / "images").mkdir()
    rows = []
    for colour in ("red", "green", "blue", "white", "black", "yellow"):
        make_image(colour).save(folder / "images" / f"{colour}.png")
        turns = [message("user", "<image>\nHow many?"), message("assistant", "two")]
        turns += [message("user", "What colour?"), message("assistant", colour)]
        rows.append({"conversations": turns, "image": f"{colour}.png", "choices": [colour, "grey"]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(home, tmp_path, monkeypatch, capsys):
    """Runs a script; TRL is slow to import, so here and not in a process of its own. Gives exit code, stdout and stderr."""
    pytest.importorskip("trl")

    def run(script, *arguments):
        command = [
            f"{script}.py",
            "--model",
            home / "start",
            "--image_folder",
            home / "images",
            "--output_dir",
            tmp_path / "out",
        ]
        command += ["--data_files", home / "rows.jsonl", "--eval_files", home / "rows.jsonl", *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        try:
            importlib.import_module(script).main()
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


# ── What TRL is given ────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_answer_is_a_question_of_its_own_with_what_was_said_before(home):
    rows = read_questions([home / "rows.jsonl"], home / "images")
    assert len(rows) == 12
    first, second = rows[:2]
    assert first["conversations"] == [message("user", "<image>\nHow many?"), message("assistant", "two")]
    assert [turn["content"] for turn in second["conversations"]] == ["<image>\nHow many?", "two", "What colour?", "red"]
    assert [Path(image).name for image in first["images"] + second["images"]] == ["red.png", "red.png"]
    assert (first["choices"], second["choices"]) == (None, ["red", "grey"])
    asked = read_questions([home / "rows.jsonl"], home / "images", "colou?r")
    assert [row["conversations"][-1]["content"] for row in asked] == ["red", "green", "blue", "white", "black", "yellow"]
    with pytest.raises(ValueError, match=r"rows\.jsonl: there is no answered question in which 'Where' is found"):
        read_questions([home / "rows.jsonl"], home / "images", "Where")


@pytest.mark.parametrize(
    ("choices", "problem"),
    [
        ("yes/no", "expected a list of texts as choices, got 'yes/no'"),
        (["no"], "the right answer 'yes' is not among its choices"),
    ],
)
def test_choices_that_cannot_be_are_refused(tmp_path, choices, problem):
    row = {"conversations": [message("user", "Is it?"), message("assistant", "yes")], "choices": choices}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 1: {problem}"):
        read_questions([tmp_path / "rows.jsonl"], tmp_path)


def test_prompts_have_the_tokens_of_training_and_read_their_images_when_used(home):
    rows = read_questions([home / "rows.jsonl"], home / "images")
    data = prompts(rows, right=["a"] * 12)
    row = data[1]
    assert row["right"] == "a"
    assert [image.size for image in row["images"]] == [(20, 20)]
    types = [[item["type"] for item in turn["content"]] for turn in row["prompt"]]
    assert types == [["image", "text"], ["text"], ["text"]]
    processor = make_processor()
    expected = processor.apply_chat_template(rows[1]["conversations"][:-1], add_generation_prompt=True)
    assert processor.apply_chat_template(row["prompt"], add_generation_prompt=True) == expected


def test_the_processor_takes_what_trl_passes():
    processor = make_processor()
    text = ["<image>\nHow many?", "<image>What colour is it?"]
    options = {"padding": True, "add_special_tokens": False, "return_tensors": "pt"}
    left = processor(images=[[make_image()], [make_image("blue")]], text=text, padding_side="left", **options)
    assert left["pixel_values"].shape == (2, 3, 16, 16)
    assert not left["attention_mask"][:, 0].all()
    assert left["attention_mask"][:, -1].all()
    right = processor(text=["yes", "no, nothing"], padding_side="right", **options)
    assert set(right) == {"input_ids", "attention_mask"}
    assert right["attention_mask"][:, 0].all()
    assert not right["attention_mask"][:, -1].all()


# ── The scripts ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_several_processes_are_refused():
    with pytest.raises(ValueError, match="Expected one process, got 2: start the script with python"):
        load("start", SimpleNamespace(world_size=2))


def test_exact_rewards_the_right_answer_alone():
    from grpo import exact

    completions = [[message("assistant", text)] for text in ("two", " two\n", "two two", "", "Two")]
    assert exact(completions=completions, right=["two"] * 5, images=[]) == [1, 1, 0, 0, 0]


@pytest.mark.parametrize(("script", "method", "options"), [("grpo", "reward", ["--questions", ""]), ("dpo", "preference", [])])
def test_a_run_leaves_a_model_curves_and_answers(home, tmp_path, run, script, method, options):
    code, stdout, stderr = run(script, "--max_steps", 2, *options)
    assert code == 0, stderr
    for name in ("reward.png", "answers.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    lines = [line for line in stdout.splitlines() if "held-out answers are exact" in line]
    assert [line.split("  ")[0] for line in lines[:2]] == ["before", "before"]
    assert f"s of {method} " in lines[2]
    assert "s of plain SFT " in lines[3]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert len(ask(model, processor, read_questions([home / "rows.jsonl"], home / "images"))) == 12


def test_long_answers_have_room_to_be_right(home, tmp_path, run, monkeypatch):
    right = "a red ring above a blue square, and beside it two yellow crosses"
    row = {"conversations": [message("user", "Describe."), message("assistant", right)]}
    (tmp_path / "long.jsonl").write_text(8 * (json.dumps(row) + "\n"))

    def trainer(args, **kwargs):
        raise ValueError(args.max_completion_length)

    monkeypatch.setattr("trl.GRPOTrainer", trainer)
    _, _, stderr = run("grpo", "--data_files", tmp_path / "long.jsonl", "--questions", "")
    assert stderr.splitlines()[-1] == f"grpo.py: error: {len(make_processor().tokenizer(right)['input_ids']) + 1}"


def test_preference_makes_the_preferred_answer_likelier_than_the_rejected_one(home, tmp_path, run):
    code, _, stderr = run("dpo", "--max_steps", 20, "--learning_rate", 1e-3)
    assert code == 0, stderr
    rows = read_questions([home / "rows.jsonl"], home / "images", "colour")
    margins = []
    for folder in (home / "start", tmp_path / "out"):
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        losses = []
        for answer in ("right", "grey"):
            turns = [
                [*row["conversations"][:-1], message("assistant", row["choices"][0] if answer == "right" else answer)]
                for row in rows
            ]
            prompt, whole = (
                processor(
                    text=processor.apply_chat_template(texts, add_generation_prompt=ask),
                    images=[row["images"] for row in rows],
                    padding=True,
                    padding_side="right",
                    return_tensors="pt",
                )
                for texts, ask in (([turn[:-1] for turn in turns], True), (turns, False))
            )
            labels = whole["input_ids"].masked_fill(whole["attention_mask"] == 0, -100)
            for row, length in zip(labels, prompt["attention_mask"].sum(1), strict=True):
                row[:length] = -100
            with torch.no_grad():
                losses.append(model(**whole, labels=labels, num_items_in_batch=1).loss.item())
        margins.append(losses[1] - losses[0])
    assert margins[1] > margins[0] + 1


@pytest.mark.parametrize(
    ("script", "arguments", "problem"),
    [
        ("grpo", ["--questions", "Where"], "there is no answered question in which 'Where' is found."),
        (
            "grpo",
            ["--questions", "("],
            "expected a regular expression (missing ), unterminated subpattern at position 0).",
        ),
        ("grpo", ["--questions", "colour"], "expected at least 8 questions, got 6."),
        ("dpo", ["--data_files", "plain.jsonl"], 'plain.jsonl: expected rows with other "choices" than the right answer.'),
        ("dpo", ["--model", "nowhere"], None),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, run, script, arguments, problem):
    monkeypatch.chdir(tmp_path)
    row = {"conversations": [message("user", "Hello?"), message("assistant", "Yes.")]}
    Path("plain.jsonl").write_text(json.dumps(row) + "\n")
    code, _, stderr = run(script, *arguments)
    assert code == 2, stderr
    last = stderr.strip().splitlines()[-1]
    assert last.startswith(f"{script}.py: error: ")
    assert problem is None or last.endswith(problem)


# ── The data of the example ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_presence_set_asks_for_what_is_there_and_what_is_not(tmp_path):
    write_presence_set(tmp_path, 30, 10, 20)
    teach, prefer, test = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("teach", "prefer", "test")
    )
    assert (len(teach), len(prefer), len(test)) == (30, 60, 20)
    answers = [turn["content"] for row in teach for turn in row["conversations"] if turn["role"] == "assistant"]
    assert 0.6 < answers.count("yes") / len(answers) < 0.8
    assert all(row["choices"] == ["yes", "no"] for row in prefer)
    for row in test:
        question, answer = (turn["content"] for turn in row["conversations"])
        name = question.removeprefix("<image>\nIs there a ").removesuffix(" in the image?")
        assert (name in row["contents"]) == (answer == "yes")
    assert presence_questions([row["contents"] for row in test])
    assert len(read_questions([tmp_path / "teach.jsonl"], tmp_path / "images")) == 180
    with pytest.raises(ValueError, match="30000, 10 and 20 images: expected 1 or more, and 28560 in all"):
        write_presence_set(tmp_path, 30_000, 10, 20)
