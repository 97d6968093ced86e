"""The walk-through says what the code does: quoted code is in its file, shown output is what is printed, solutions run."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import make_model, make_processor
from PIL import Image


ROOT = Path(__file__).parent.parent
PAGES = ("docs/walkthrough.md", "docs/walkthrough_zh.md")
SCRIPT = ROOT / "examples" / "walkthrough.py"


def blocks(page: str, kind: str) -> list[tuple[str, str]]:
    """The (argument, text) of fenced blocks that a comment `<!-- kind: argument -->` precedes."""
    pattern = rf"^<!-- {kind}(?:: (\S+))? -->\n```\w*\n(.*?)\n```$"
    return re.findall(pattern, (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def holds(file: str, quoted: str) -> bool:
    """Whether these lines stand in a file one after another, at whatever indentation."""
    lines, count = (ROOT / file).read_text(encoding="utf-8").split("\n"), quoted.count("\n") + 1
    return any(textwrap.dedent("\n".join(lines[start : start + count])) == quoted for start in range(len(lines)))


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300)


@pytest.mark.parametrize("page", PAGES)
def test_quoted_code_is_in_its_file(page):
    quotes = blocks(page, "quote")
    assert len(quotes) == 9
    for file, quoted in quotes:
        assert holds(file, quoted), f"{page} quotes what {file} no longer holds:\n{quoted}"


@pytest.mark.parametrize("page", PAGES)
def test_our_lines_in_the_table_are_in_their_files(page):
    rows = re.findall(r"^\| .+? \| (.+) \| `([\w/]+\.py)` \|$", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(rows) == 14
    for ours, file in rows:
        for line in re.findall(r"`([^`]+)`", ours):
            assert line in (ROOT / file).read_text(encoding="utf-8"), f"{page}: {line} is no longer in {file}"


def test_solutions_run():
    english, chinese = ([code for _, code in blocks(page, "run")] for page in PAGES)
    assert len(english) == 9
    assert chinese[1:] == english[1:]  # the first differs in its comments
    names: dict = {}
    for code in (chinese[0], *english):
        exec(compile(code, "solutions", "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_images_exist(page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8"))
    assert [target for target in targets if not (ROOT / "docs" / target).exists()] == []


def test_the_shown_output_is_what_the_script_prints():
    result = run_script()
    assert result.returncode == 0, result.stderr
    printed = result.stdout.splitlines()
    assert "encoder         [1, 197, 768]       class tokens: 1, patches: 196" in printed
    for page in PAGES:
        ((script, shown),) = blocks(page, "output")
        assert script == "examples/walkthrough.py"
        # The loss depends on the machine's random numbers
        assert [line for line in shown.split("\n") if not line.startswith("loss")] == [
            line.rstrip() for line in printed if not line.startswith("loss")
        ]


def test_the_script_walks_through_a_saved_model(tmp_path):
    make_model().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    result = run_script("--model", str(tmp_path))
    assert result.returncode == 0, result.stderr
    lines = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    for name, shape in {
        "pixel_values": "[1, 3, 16, 16]",
        "encoder": "[1, 17, 32]",
        "patches": "[1, 16, 32]",
        "projector": "[1, 16, 32]",
        "layer 1": "32]",
        "logits": "320]",
    }.items():
        assert shape in lines[name]


def test_a_step_that_is_not_as_expected_is_an_error(tmp_path):
    make_model().save_pretrained(tmp_path)
    processor = make_processor()
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    settings["image_seq_length"] = 15  # one placeholder fewer than the model makes image tokens
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    result = run_script("--model", str(tmp_path))
    assert result.returncode == 2
    assert "15 image tokens" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_drawings(tmp_path):
    specification = importlib.util.spec_from_file_location("draw_walkthrough", ROOT / "docs" / "draw_walkthrough.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.draw_patches(Image.new("RGB", (64, 64), "red"), tmp_path / "patches.png")
    module.draw_prompt(make_processor(), tmp_path / "prompt.png")
    with Image.open(tmp_path / "patches.png") as patches:
        assert patches.convert("RGB").getpixel((300, 300)) == (255, 0, 0)
    with Image.open(tmp_path / "prompt.png") as prompt:
        colours = {colour for _, colour in prompt.convert("RGB").getcolors(2**24)}
    assert {(0xDF, 0xE3, 0xEA), (0xF6, 0xC7, 0x7D), (0x8F, 0xD1, 0x9E)} <= colours  # text, image tokens, learned ones


NOTEBOOK = ROOT / "notebooks" / "walkthrough.ipynb"


def test_the_notebook_keeps_its_outputs():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert NOTEBOOK.stat().st_size < 2**20
    assert all(cell["execution_count"] == number for number, cell in enumerate(cells, start=1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert "/tmp" not in text
    assert "projector       [1, 16, 128]" in text


@pytest.mark.timeout(900)
def test_the_notebook_runs(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # Few images and steps, which is enough to answer something
    environment = {"WALKTHROUGH_FOLDER": str(tmp_path / "run"), "WALKTHROUGH_IMAGES": "480", "WALKTHROUGH_STEPS": "5"}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "datasets"), "PYTHONPATH": str(ROOT)}
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute(env=os.environ | environment)
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "6 tensors of shape [1, 2, 24, 32]: 36,864 bytes" in text
    assert "of 100 held-out questions are answered exactly" in text
    assert "The prompts hold 16 image tokens" in text
