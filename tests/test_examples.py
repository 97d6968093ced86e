"""The examples as a user runs them: real processes, on small data."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import quickstart as quickstart_script
import transformers

import minimind_v_hf
from minimind_v_hf import shapes
from minimind_v_hf.shapes import PLACES, all_scenes, descriptions, draw, questions, write_data_set


ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: object, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **kwargs)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    done = run("quickstart.py", "--output", folder, "--train-images", 64, "--test-images", 8)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_quickstart_leaves_a_model_answers_and_images(quickstart):
    folder, printed = quickstart
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 16
    assert all(row["right"] == (row["answer"] == row["conversations"][1]["content"]) for row in answers)
    results = json.loads((folder / "results.json").read_text())
    assert results["exact"] == sum(row["right"] for row in answers) / 16
    assert f"{results['exact']:.1%}" in printed
    for name in ("answers.png", "loss.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / "model" / "modeling_minimind_v.py").exists()
    assert len({path.stat().st_mode for path in (folder / "model").iterdir()}) == 1  # not for the owner alone


def other_answers(*arguments, **options):
    """The answers of another model."""
    return ["nothing"] * len(arguments[2]["input_ids"])


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        (
            "answer_questions",
            other_answers,
            r"answers 8 of 8 held-out questions otherwise than .* says 'nothing'",
        ),
        ("ENOUGH", 10, r"\d+% of the held-out answers are right, and the commonest would give \d+%"),
    ],
)
def test_the_first_run_fails_when_the_saved_model_does_not_answer_as_in_training(
    monkeypatch, capsys, tmp_path, name, value, problem
):
    monkeypatch.setattr(quickstart_script, name, value)
    options = ["--output", str(tmp_path), "--train-images", "16", "--test-images", "4"]
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *options])
    with pytest.raises(SystemExit) as end:
        quickstart_script.main()
    assert end.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(f"FAILED: .*{problem}", last)
    assert f"minimind_v_hf {minimind_v_hf.__version__}, transformers {transformers.__version__}" in last


def test_chat_answers_about_an_image(quickstart):
    folder, _ = quickstart
    image = folder / "data" / "images" / "test-00000.jpg"
    options = ["--model", folder / "model", "--max-new-tokens", 5]
    done = run("chat.py", *options, "--image", image, "How many shapes are there?")
    assert done.returncode == 0, done.stderr[-2000:]
    missing = run("chat.py", *options, "--image", "nowhere.jpg", "How many?")
    assert missing.returncode == 2
    assert "Cannot read the image (nowhere.jpg): there is no such file" in missing.stderr


@pytest.mark.parametrize(
    ("script", "launcher"),
    [
        ("quickstart.py", "python"),
        ("chat.py", "python"),
        ("evaluate.py", "python"),
        ("pretrain.py", "python"),
        ("../benchmarks/training.py", "python"),
    ],
)
def test_help(script, launcher):
    done = run(script, "--help")
    assert done.returncode == 0
    assert f"{launcher} {Path('examples', script).as_posix().removeprefix('examples/../')}" in done.stdout


def test_no_scene_is_in_both_files(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(shapes, "draw", lambda scene, rng: drawn.append(scene) or draw(scene, rng))
    write_data_set(tmp_path, train_images=3000, test_images=40, turns=2)
    rows = {}
    for name in ("train", "test"):
        rows[name] = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows["train"]) == 3000
    assert len(rows["test"]) == 80
    assert {row["kind"] for row in rows["test"]} == {"colour", "count", "position", "shape"}
    assert len(drawn) == 3000 + 40
    assert not set(drawn[:3000]) & set(drawn[3000:])


def test_questions_have_the_right_answers():
    red_ring = (("ring", "圆环"), ("red", "红色"))
    scene = next(s for s in all_scenes() if s[1] == red_ring and s[2] == red_ring and not s[0] and not s[3])
    english = {question.text[0]: question.answer[0] for question in questions(scene)}
    assert english == {
        "How many shapes are there?": "two",
        "What colour is the shape at the top right?": "red",
        "Which shape is at the top right?": "ring",
        "What colour is the shape at the bottom left?": "red",
        "Which shape is at the bottom left?": "ring",
    }  # where the red shape is has two answers, so nobody asks
    places_first, things_first = descriptions(scene, random.Random(0))
    assert places_first.answer == ("top right red ring, bottom left red ring", "右上红色圆环，左下红色圆环")
    assert sorted(things_first.answer[0].split(", ")) == ["red ring bottom left", "red ring top right"]
    assert sorted(things_first.answer[1].split("，")) == ["红色圆环右上", "红色圆环左下"]
    assert len(all_scenes()) == 13 ** len(PLACES) - 1


def test_the_measurements_on_a_gpu_say_in_one_line_that_there_is_none(tmp_path):
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    described = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "bash benchmarks/gpu.sh [FOLDER]" in described.stdout
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""}
    refused = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, check=False, env=environment)
    assert refused.returncode == 1
    assert refused.stderr == "gpu.sh: PyTorch sees no CUDA GPU here.\n"
    assert not (tmp_path / "out").exists()
