"""The check command, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_image, make_processor

from minimind_v_hf.data.check import main


def chat(question: str, answer: str = "red", **row) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"conversations": messages, **row}, ensure_ascii=False)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name, colour in (("red", "red"), ("blue", "blue"), ("again", "red")):
        make_image(colour).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "images" / "bad.png").write_bytes((tmp_path / "images" / "red.png").read_bytes()[:50])
    (tmp_path / "secret.png").write_bytes((tmp_path / "images" / "red.png").read_bytes())
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")

    def write(*lines: str, name: str = "data.jsonl") -> str:
        (tmp_path / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return name

    return write


def check(*arguments: str, capsys) -> tuple[int, str]:
    status = main(["check", *arguments, "--num-proc", "1"])
    return status, capsys.readouterr().out


def test_a_good_file(files, capsys):
    data = files(chat("<image>Hi", image="red.png"), chat("<image><image>", image="red.png, blue.png"), chat("Hi"), "")
    make_processor().save_pretrained("processor")
    status, printed = check(data, "--images", "images", "--model", "processor", "--max-length", "55", "80", capsys=capsys)
    assert status == 0
    for line in (
        "rows             3",
        "answers per row  1: 3 (100.0%)",
        "images per row   0: 1 (33.3%)   1: 1 (33.3%)   2: 1 (33.3%)",
        "✓ No problems.",
    ):
        assert line in printed.splitlines()
    lengths = [len(ids) for ids in make_processor()(text=prompts(), images=IMAGES)["input_ids"]]
    assert f"length           {min(lengths)} to {max(lengths)} tokens, median {sorted(lengths)[1]}," in printed
    assert sum(int(line.split()[-1]) for line in printed.splitlines() if "–" in line) == 3
    assert Path("runs/check/lengths.png").read_bytes().startswith(b"\x89PNG")


IMAGES = [[make_image()], [make_image(), make_image()], []]


def prompts() -> list[str]:
    rows = [chat("<image>Hi"), chat("<image><image>"), chat("Hi")]
    return [make_processor().apply_chat_template(json.loads(row)["conversations"]) for row in rows]


def test_rows_that_would_be_cut(files, capsys):
    data = files(chat("Hi"), chat("Hi", "lazy " * 100), chat("Hi " * 200))
    make_processor().save_pretrained("processor")
    status, printed = check(data, "--model", "processor", "--max-length", "100", "1000", capsys=capsys)
    assert status == 0
    assert "cut at 100       1 rows, and 1 dropped, whose prompt alone is longer" in printed
    assert "cut at 1,000     0 rows, and 0 dropped, whose prompt alone is longer" in printed


def test_everything_that_is_wrong_is_listed(files, capsys):
    lines = [
        chat("<image>", image="red.png"),
        chat("<image>", image="again.png"),
        '{"conversations": [',
        chat("<image>", image="nowhere.png"),
        chat("<image>", image="bad.png"),
        chat("<image>", image="../secret.png"),
        chat("<image>", image="link.png"),
        chat("<image><image>", image="red.png"),
        chat("Hi", "  "),
        json.dumps({"conversations": [{"role": "human", "content": "Hi"}]}),
        json.dumps({"conversations": [{"role": "user", "content": "Hi"}]}),
        json.dumps({"text": "Hi"}),
        "no JSON",
    ]
    status, printed = check(files(*lines), "--images", "images", capsys=capsys)
    assert status == 1
    sections = {}
    for section in printed.split("\n\n")[1:]:
        title, *examples = section.splitlines()
        sections[title] = [example.strip() for example in examples]
    expected = {
        "! images with the same bytes as another (no problem by itself): 1": ["again.png"],
        "✗ lines that are not JSON: 2": ["line 3: ", "line 13: "],
        "✗ rows of another format: 1": ["line 12: "],
        "✗ rows with a wrong role: 1": ["line 10: "],
        "✗ rows whose image leads out of the folder: 1": ["line 6: "],
        "✗ rows whose image is a link out of the folder: 1": ["line 7: "],
        "✗ rows with a missing image: 1": ["line 4: "],
        "✗ rows with a corrupt image: 1": ["line 5: "],
        "✗ rows whose <image> do not match their images: 1": ["line 8: 2 <image> placeholders, but 1 images"],
        "✗ rows with an empty answer: 1": ["line 9"],
        "✗ rows in which no assistant speaks: 1": ["line 11"],
    }
    for title, examples in expected.items():
        found = sections.pop(title)
        assert len(found) == len(examples), title
        assert all(example in line for example, line in zip(examples, found, strict=True)), title
    assert list(sections) == ["Problems: 11."]


def test_only_so_many_examples_are_shown(files, capsys):
    data = files(*[chat("Hi", "") for _ in range(30)], *["no JSON"] * 30)
    _, printed = check(data, "--limit", "5", capsys=capsys)
    assert "✗ rows with an empty answer: 30" in printed
    assert "… and 25 more (--limit 0 shows all)" in printed
    assert printed.count("is not valid JSON") == 30
    _, printed = check(data, "--limit", "0", capsys=capsys)
    assert "more" not in printed


def test_parquet(files, tmp_path, capsys):
    rows = [chat("<image>"), chat("<image>"), chat("Hi")]
    good, bad = ((tmp_path / "images" / name).read_bytes() for name in ("red.png", "bad.png"))
    conversations = [json.dumps(json.loads(row)["conversations"]) for row in rows]
    pq.write_table(pa.table({"conversations": conversations, "image_bytes": [[good], [bad], []]}), "data.parquet")
    status, printed = check("data.parquet", capsys=capsys)
    assert status == 1
    assert "✗ rows with a corrupt image: 1\n    data.parquet, row 2: " in printed


def test_the_command_and_its_exit_status(files):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "minimind_v_hf.data", *arguments]
        environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": ""}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    done = run("check", files("no JSON"))
    assert done.returncode == 1, done.stderr
    assert "line 1: the line is not valid JSON" in done.stdout
    assert "100%" in done.stderr  # the progress bar
    missing = run("check", "nowhere.jsonl")
    assert missing.returncode == 2
    assert "There is no data file 'nowhere.jsonl'" in missing.stderr


def test_wrong_usage(files, capsys):
    data = files(chat("Hi"))
    files("no Parquet", name="bad.parquet")
    for arguments in (
        [],
        ["check"],
        ["check", data, "--images", "nowhere"],
        ["check", data, "--model", "nowhere"],
        ["check", data, "--limit", "-1"],
        ["check", data, "--max-length", "0"],
        ["check", data, "--num-proc", "0"],
        ["check", "bad.parquet"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        main(["check", "--help"])
    assert stopped.value.code == 0
    assert "exit status is 0" in capsys.readouterr().out


def test_a_histogram_that_cannot_be_written_is_no_reason_to_fail(files, capsys):
    Path("file").write_text("")
    status, printed = check(files(chat("Hi")), "--histogram", "file/lengths.png", capsys=capsys)
    assert status == 0
    assert "No histogram was drawn: " in printed
