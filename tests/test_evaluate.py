"""Measuring a model: figures checked by hand, likelihoods against one prompt at a time, and a run that is cut short."""

import io
import itertools
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import MOE, make_image, make_model, make_processor
from evaluate import answer, ask_presence, choice_scores, fingerprint, finished_rows, main, read_questions, table

from minimind_v_hf.data.images import read_image


EVALUATE = Path(__file__).parents[1] / "examples" / "evaluate.py"


@pytest.mark.parametrize("text_config", [None, MOE], ids=["dense", "moe"])
def test_likelihoods_are_those_of_each_answer_read_alone(text_config):
    torch.manual_seed(2)
    model, processor = make_model(text_config), make_processor()
    questions = ["<image>\nWhat colour is the circle?", "Two?", "<image><image>图中"]
    images = [[make_image()], [], [make_image("blue"), make_image("green")]]
    choices = [["red", "a blue one", "左上"], ["yes"], ["x", "four shapes"]]
    prompts = processor.apply_chat_template([[{"role": "user", "content": q}] for q in questions], add_generation_prompt=True)
    with torch.no_grad():
        inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
        scores = choice_scores(model, processor, inputs, choices)
        for prompt, own_images, given, row in zip(prompts, images, choices, scores, strict=True):
            assert len(given) == len(row)
            alone = processor(text=prompt, images=own_images or None, return_tensors="pt")
            for text, score in zip(given, row, strict=True):
                ids = processor.tokenizer(text)["input_ids"] + [processor.tokenizer.eos_token_id]
                whole = torch.cat((alone["input_ids"], torch.tensor([ids])), dim=1)
                logits = model(whole, pixel_values=alone.get("pixel_values")).logits[0].log_softmax(-1)
                start = alone["input_ids"].shape[1]
                expected = sum(logits[start + i - 1, token] for i, token in enumerate(ids))
                assert score == pytest.approx(expected.item(), abs=1e-4)


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(1)
    make_model().save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    (folder / "images").mkdir()
    rows = []
    for number, colour in enumerate(["red", "green", "blue", "white", "black"]):
        make_image(colour).save(folder / "images" / f"{number}.png")
        messages = [{"role": "user", "content": "<image>\nWhat colour?"}, {"role": "assistant", "content": colour}]
        rows.append({"conversations": messages, "image": f"{number}.png", "kind": "colour", "choices": ["red", colour]})
        if number < 2:
            rows[-1]["contents"] = [f"{colour} square"]
    rows.append({"conversations": [{"role": "user", "content": "几？"}, {"role": "assistant", "content": "三"}]})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_and_one_that_goes_on_after_an_interruption(data_set, monkeypatch, capsys):
    options = ["--model", "model", "--data", "data.jsonl", "--images", "images", "--batch-size", "2", "--max-new-tokens", "4"]
    monkeypatch.chdir(data_set)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *options, "--output", "whole.jsonl"])
    main()
    lines = Path("whole.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 10
    assert all(row["right"] == (row["answer"] == row["conversations"][1]["content"]) for row in rows)
    assert [row["choice"] in row["choices"] for row in rows[:5]] == [True] * 5
    assert {(row["conversations"][0]["content"], row["image"], row["conversations"][1]["content"]) for row in rows[6:]} == {
        ("<image>\nIs there a red square in the image?", "0.png", "yes"),
        ("<image>\nIs there a red square in the image?", "1.png", "no"),
        ("<image>\nIs there a green square in the image?", "0.png", "no"),
        ("<image>\nIs there a green square in the image?", "1.png", "yes"),
    }
    assert table(rows) in capsys.readouterr().out
    assert Path("whole_errors.png").read_bytes().startswith(b"\x89PNG")

    # As if the power had failed in the middle of the fourth line
    files = [Path("images", row["image"]).resolve() for row in rows if "image" in row]
    settings = {"model": fingerprint(Path("model")), "data": fingerprint(Path("data.jsonl")), "images": fingerprint(*files)}
    settings |= {"length": 4, "precision": "float32", "presence": "Is there a {} in the image?"}
    # Separators of lines other than a line feed may stand in a text
    first = json.dumps({**rows[0], "answer": "from\u2028before\x85"}, ensure_ascii=False) + "\n"
    Path("rest.jsonl.part").write_text(json.dumps(settings) + "\n" + first + "".join(lines[1:3]) + lines[3][:20])
    command = [sys.executable, str(EVALUATE), *options, "--output", "rest.jsonl"]
    rest = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert rest.returncode == 0, rest.stderr[-2000:]
    assert "3 of 10 questions were answered before" in rest.stderr
    expected = [{**rows[0], "answer": "from\u2028before\x85"}, *rows[1:]]
    assert [json.loads(line) for line in Path("rest.jsonl").read_text().split("\n")[:-1]] == expected
    assert not Path("rest.jsonl.part").exists()


def test_changed_files_are_noticed(tmp_path):
    (tmp_path / "model").mkdir()
    make_image("red").save(tmp_path / "a.png")
    before = fingerprint(tmp_path / "model"), fingerprint(tmp_path / "a.png")
    make_image("blue").save(tmp_path / "a.png")
    (tmp_path / "model" / "weights").touch()
    assert fingerprint(tmp_path / "model") != before[0]
    assert fingerprint(tmp_path / "a.png") != before[1]
    assert fingerprint(tmp_path / "model") == fingerprint(tmp_path / "model")
    member, states = f"zip://a.png::{tmp_path / 'a.zip'}", set()
    for colour in ("red", "blue"):
        with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
            archive.writestr(f"{colour}.png", colour)
        states.add(fingerprint(member))
    assert len(states) == 2


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"--output": "data.jsonl"}, "--output data.jsonl: expected the name of a new file"),
        ({"--output": "images"}, "--output images: expected the name of a new file"),
        ({"--data": "images"}, "expected a file and a folder: --data images"),
        ({"--model": "nowhere"}, "Cannot load the model 'nowhere': there is no such folder"),
        ({"--batch-size": "0"}, "expected 1 or more"),
        ({"--presence": "Is it there?"}, "expected a question with {} for the name"),
    ],
)
def test_wrong_arguments_are_one_line(data_set, monkeypatch, capsys, options, error):
    monkeypatch.chdir(data_set)
    options = {"--model": "model", "--data": "data.jsonl", "--images": "images", "--output": "never.jsonl"} | options
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *itertools.chain(*options.items())])
    before = Path("data.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        main()
    assert error in capsys.readouterr().err
    assert Path("data.jsonl").read_bytes() == before


def test_answers_of_another_model_are_not_taken_over(tmp_path, capsys):
    unfinished = tmp_path / "a.part"
    unfinished.write_text('{"model": 1}\n{"answer": "old"}\n')
    assert finished_rows(unfinished, {"model": 2}, [{}, {}]) == []
    assert "another model, data set, images or length" in capsys.readouterr().err
    assert unfinished.read_text() == '{"model": 2}\n'


def answered(question, role="user", **more):
    messages = [{"role": role, "content": question}, {"role": "assistant", "content": "a"}]
    return json.dumps({"conversations": messages, **more})


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", "line 2: the line is not valid JSON"),
        ("[" * 100_000, "line 2: the line is not valid JSON"),
        (answered("?", role="tool"), "line 2: unknown role 'tool'"),
        (answered("<image>", image="../secret.png"), "line 2: the image '../secret.png' leads out of"),
        (answered("<image>", image="/etc/hosts"), "line 2: the image '/etc/hosts' leads out of"),
        (answered("<image>", image="link.png"), "line 2: .*link.png.*symbolic link leads out of"),
        (answered("?", kind="\ud800"), "line 2: the row cannot be written as JSON"),
        (answered("?", image="0.png"), "line 2: 0 <image> placeholders, but 1 images"),
        (answered("?", contents=["cat"]), "line 2: it has contents, but no image"),
        (answered("<image>", contents="cat", image="red.png"), "line 2: expected a list of names as contents, got 'cat'"),
        ('{"image": "0.png"}', "line 2: .*'conversations'"),
        ('{"conversations": [{"role": "user", "content": "Hi"}]}', "line 2: expected a question"),
        (
            '{"conversations": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"}]}',
            "1 <image> .* 0",
        ),
        (
            '{"image": "x.png", "conversations": [{"role": "user", "content": "<image>"},'
            ' {"role": "assistant", "content": "a"}]}',
            "line 2: .*x.png': there is no such file",
        ),
        (
            '{"conversations": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}], "choices": ["b"]}',
            "line 2: the right answer 'a' is not among its choices",
        ),
        (
            '{"conversations": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}], "choices": "abc"}',
            "line 2: expected a list of texts as choices, got 'abc'",
        ),
        (
            '{"conversations": [{"role": "bot", "content": "?"}, {"role": "assistant", "content": "a"}]}',
            "line 2: unknown role 'bot'",
        ),
        (
            '{"conversations": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}',
            "line 2: the text holds half a surrogate pair",
        ),
        (
            '{"image": "broken.png", "conversations": [{"role": "user", "content": "<image>"},'
            ' {"role": "assistant", "content": "a"}]}',
            "line 2: .*broken.png",
        ),
    ],
)
def test_bad_rows_are_named_before_any_work(line, error, tmp_path):
    good = '{"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n'
    (tmp_path / "data.jsonl").write_text(good + line + "\n")
    outside = tmp_path.parent / "outside.png"
    make_image().save(outside)
    (tmp_path / "link.png").symlink_to(outside)
    make_image().save(tmp_path / "red.png")
    make_image().save(tmp_path / "broken.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "broken.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=error):
        read_questions(tmp_path / "data.jsonl", tmp_path)


def test_table_without_choices_and_with_two_languages():
    def row(right, text, kind, **more):
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": right}]
        right = right == text
        return {"conversations": messages, "answer": text, "right": right, "f1": float(right), "kind": kind, **more}

    rows = [
        row("red", "red", "colour", right_text_only=True),
        row("红", "绿", "colour", right_text_only=False),
        row("two", "two", "count", choice="a column of the data set's own"),
        row("yes", "Yes, there is.", "presence", right_text_only=False, presence="cat"),
    ]
    lines = table(rows).splitlines()
    assert lines[0].split("  ")[0] == "questions"
    # By Wilson: 1 of 1 is 20.7% to 100%, 0 of 1 up to 79.3%, 1 of 2 is 9.5% to 90.5%
    assert {line[:19].strip(): line[19:].split()[:6] for line in lines[1:7]} == {
        "colour": ["2", "50.0%", "(9.5–90.5)", "50.0%", "(9.5–90.5)", "100.0%"],
        "count": ["1", "100.0%", "(20.7–100.0)", "–", "100.0%", "100.0%"],
        "presence": ["1", "0.0%", "(0.0–79.3)", "0.0%", "(0.0–79.3)", "100.0%"],
        "in Chinese": ["1", "0.0%", "(0.0–79.3)", "0.0%", "(0.0–79.3)", "100.0%"],
        "in other languages": ["2", "100.0%", "(34.2–100.0)", "100.0%", "(20.7–100.0)", "100.0%"],
        "all": ["3", "66.7%", "(20.8–93.9)", "50.0%", "(9.5–90.5)", "100.0%"],  # that the data set itself asks
    }
    assert lines[-2].split() == ["yes", "or", "no", "asked", "accuracy", "(95%)", "precision", "recall", "F1", "yes", "neither"]
    assert lines[-1].split() == ["presence", "1", "100.0%", "(20.7–100.0)", *["100.0%"] * 4, "0"]


def test_text_only_answers_are_those_to_the_question_alone():
    torch.manual_seed(5)
    model, processor = make_model(), make_processor()
    right = {"role": "assistant", "content": "red"}
    alone = [{"role": "user", "content": "What?"}, right]
    rows = [{"conversations": [{"role": "user", "content": "<image>\nWhat?"}, right]}, {"conversations": alone}]
    first, second = answer(model, processor, rows, [[make_image()], []], 8)
    assert first["answer_text_only"] == second["answer"] != first["answer"]
    assert first["right_text_only"] is False
    assert "answer_text_only" not in second


def test_what_images_contain_becomes_questions():
    conversation = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "a cat"}]
    row = {"conversations": conversation, "choices": ["a cat", "a dog"], "image": "0.png"}
    rows = [{**row, "contents": ["cat"]}, {**row, "contents": ["cat"]}, {**row, "contents": []}, row]
    asked, shown = ask_presence(rows, [["0.png"], ["0.png"], ["1.png"], ["2.png"]], "Is there a {}?")
    assert [(*(message["content"] for message in row["conversations"]), row["kind"]) for row in asked] == [
        ("<image>\nIs there a cat?", "yes", "presence"),
        ("<image>\nIs there a cat?", "no", "presence"),
    ]
    assert shown == [["0.png"], ["1.png"]]  # once of an image that several rows have
    assert not any(row["choices"] for row in asked)
    asked, _ = ask_presence(rows, [["0.png"], ["0.png"], ["1.png"], ["2.png"]], "图中有{}吗？")
    assert [row["conversations"][1]["content"] for row in asked] == ["有", "没有"]


def test_questions_may_have_any_form_that_training_takes(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        make_image().save(file := io.BytesIO(), "PNG")
        archive.writestr("red.png", file.getvalue())
    question = {"role": "user", "content": [{"type": "image", "path": "red.png"}, {"type": "text", "text": "\nWhich?"}]}
    row = {"messages": [question, {"role": "assistant", "content": "red"}], "kind": "colour", "presence": 1}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    ((read,), ((source,),)) = read_questions(tmp_path / "data.jsonl", tmp_path / "images.zip")
    assert read["conversations"][0] == {"role": "user", "content": "<image>\nWhich?"}
    assert read["kind"] == "colour"
    assert "presence" not in read  # or it would count as one of the questions about contents
    assert read_image(source).getpixel((0, 0)) == (255, 0, 0)
