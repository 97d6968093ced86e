"""`--help` and running without the optional packages: no script ends in a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]

OPTIONAL = ["matplotlib", "gradio", "peft", "trl", "onnx", "onnxruntime", "sacrebleu", "tensorboard", "av"]
OPTIONAL += ["gguf", "xllamacpp"]
BLOCKED = f"""
import sys, runpy
from importlib.machinery import PathFinder
find = PathFinder.find_spec
optional = {OPTIONAL!r}
PathFinder.find_spec = staticmethod(lambda name, *more: None if name.split(".")[0] in optional else find(name, *more))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


QUESTIONS = ["--model", "m", "--data_files", "d", "--eval_files", "e", "--image_folder", "i", "--output_dir", "o"]
SCRIPTS = [str(path.relative_to(ROOT)) for folder in ("convert", "examples") for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_without_the_optional_packages(script):
    command = [sys.executable, "-c", BLOCKED, str(ROOT / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if script == "examples/sft_trl.py":  # its flags are those of TRL, so without it there are none to list
        assert 'TRL is not installed: pip install -e ".[trl]"' in done.stderr
        assert "python examples/sft_trl.py --model" in done.stderr
    else:
        assert done.returncode == 0, done.stderr[-2000:]
        assert "usage:" in done.stdout


@pytest.mark.parametrize(
    ("script", "options", "extra"),
    [
        ("examples/quickstart.py", [], "train"),
        ("examples/web_demo.py", ["--model", "m"], "demo"),
        ("examples/attention_map.py", ["--model", "m", "--image", "a.png", "?"], "train"),
        ("convert/to_gguf.py", ["--model", "m", "--output", "o"], "gguf"),
        ("examples/grpo.py", QUESTIONS, "train,trl"),
        ("examples/dpo.py", QUESTIONS, "train,trl"),
        ("convert/to_onnx.py", ["--model", "m", "--output", "o"], "onnx"),
    ],
)
def test_without_its_package_a_script_says_what_to_install(script, options, extra):
    command = [sys.executable, "-c", BLOCKED, str(ROOT / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert f'pip install -e ".[{extra}]"' in done.stderr
    assert "Traceback" not in done.stderr
