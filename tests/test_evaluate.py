"""Measuring a model: figures checked by hand, likelihoods against one prompt at a time, and a run that is cut short."""

import io
import itertools
import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import MOE, make_image, make_model, make_processor
from evaluate import choice_scores, corpus_bleu, fingerprint, finished_rows, main, read_questions, table, token_f1

from minimind_v_hf.data.images import read_image


EVALUATE = Path(__file__).parents[1] / "examples" / "evaluate.py"


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("red", "red", 1.0),
        ("Red.", "red", 1.0),
        ("a red ring", "a blue ring", 2 / 3),
        ("red red", "red", 2 / 3),
        ("红色", "红色的", 4 / 5),
        ("左上 ring", "左上", 4 / 5),
        ("", "red", 0.0),
        ("", "…", 1.0),
    ],
)
def test_token_f1(answer, right, expected):
    assert math.isclose(token_f1(answer, right), expected)


def test_bleu():
    pytest.importorskip("sacrebleu")
    assert corpus_bleu(["red", "two"], ["red", "two"]) == pytest.approx(100)
    # By hand: precisions of one to four words, and the same lengths
    expected = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert corpus_bleu(["the cat sat on a mat"], ["the cat sat on the mat"]) == pytest.approx(expected)
    # Words would have nothing in common; characters have 3 of 4, 2 of 3, 1 of 2, and 0 of 1, which smoothing makes 1/2
    expected = 100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert corpus_bleu(["左上红环"], ["左上红球"]) == pytest.approx(expected)


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
        for prompt, pictures, some, row in zip(prompts, images, choices, scores, strict=True):
            assert len(some) == len(row)
            alone = processor(text=prompt, images=pictures or None, return_tensors="pt")
            for text, score in zip(some, row, strict=True):
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
    assert len(rows) == 6
    assert all(row["right"] == (row["answer"] == row["conversations"][1]["content"]) for row in rows)
    assert [row["choice"] in row["choices"] for row in rows[:5]] == [True] * 5
    assert table(rows) in capsys.readouterr().out
    assert Path("whole_errors.png").read_bytes().startswith(b"\x89PNG")

    # As if the power had failed in the middle of the fourth line
    pictures = [Path("images", row["image"]).resolve() for row in rows[:5]]
    settings = {"model": fingerprint(Path("model")), "data": fingerprint(Path("data.jsonl")), "images": fingerprint(*pictures)}
    settings |= {"length": 4, "int8": False}
    # Some separators of lines may stand in a text
    first = json.dumps({**rows[0], "answer": "from\u2028before\x85"}, ensure_ascii=False) + "\n"
    Path("rest.jsonl.part").write_text(json.dumps(settings) + "\n" + first + "".join(lines[1:3]) + lines[3][:20])
    command = [sys.executable, str(EVALUATE), *options, "--output", "rest.jsonl"]
    rest = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert rest.returncode == 0, rest.stderr[-2000:]
    assert "3 of 6 questions were answered before" in rest.stderr
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


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"--output": "data.jsonl"}, "--output data.jsonl: expected the name of a new file"),
        ({"--output": "images"}, "--output images: expected the name of a new file"),
        ({"--data": "images"}, "expected a file and a folder: --data images"),
        ({"--model": "nowhere"}, "Cannot load the model 'nowhere': there is no such folder"),
        ({"--batch-size": "0"}, "expected 1 or more"),
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
    make_image().save(tmp_path / "broken.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "broken.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=error):
        read_questions(tmp_path / "data.jsonl", tmp_path)


def test_table_without_choices_and_with_two_languages():
    def row(right, answer, kind):
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": right}]
        return {
            "conversations": messages,
            "answer": answer,
            "right": right == answer,
            "f1": float(right == answer),
            "kind": kind,
        }

    lines = table([row("red", "red", "colour"), row("红", "绿", "colour"), row("two", "two", "count")]).splitlines()
    shares = {line[:20].strip(): line[20:].split()[:3] for line in lines[1:6]}
    assert shares == {
        "colour": ["2", "50.0%", "50.0%"],
        "count": ["1", "100.0%", "100.0%"],
        "in Chinese": ["1", "0.0%", "0.0%"],
        "in other languages": ["2", "100.0%", "100.0%"],
        "all": ["3", "66.7%", "66.7%"],
    }


def test_questions_may_have_any_form_that_training_takes(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        make_image().save(file := io.BytesIO(), "PNG")
        archive.writestr("red.png", file.getvalue())
    question = {"role": "user", "content": [{"type": "image", "path": "red.png"}, {"type": "text", "text": "\nWhich?"}]}
    row = {"messages": [question, {"role": "assistant", "content": "red"}], "kind": "colour"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    ((read,), ((source,),)) = read_questions(tmp_path / "data.jsonl", tmp_path / "images.zip")
    assert read["conversations"][0] == {"role": "user", "content": "<image>\nWhich?"}
    assert read["kind"] == "colour"
    assert read_image(source).getpixel((0, 0)) == (255, 0, 0)
