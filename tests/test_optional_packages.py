"""`--help` and running without the optional packages: no script ends in a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]

OPTIONAL = ["matplotlib", "gradio", "peft", "trl", "onnx", "onnxruntime", "sacrebleu", "tensorboard", "av"]
BLOCKED = f"""
import sys, runpy
from importlib.machinery import PathFinder
find = PathFinder.find_spec
optional = {OPTIONAL!r}
PathFinder.find_spec = staticmethod(lambda name, *more: None if name.split(".")[0] in optional else find(name, *more))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_help_without_the_optional_packages(script):
    command = [sys.executable, "-c", BLOCKED, str(ROOT / "examples" / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if script == "sft_trl.py":  # its flags are those of TRL, so without it there are none to list
        assert 'TRL is not installed: pip install -e ".[trl]"' in done.stderr
        assert "python examples/sft_trl.py --model" in done.stderr
    else:
        assert done.returncode == 0, done.stderr[-2000:]
        assert "usage:" in done.stdout


@pytest.mark.parametrize(
    ("script", "options", "extra"),
    [
        ("quickstart.py", [], "train"),
        ("web_demo.py", ["--model", "m"], "demo"),
        ("attention_map.py", ["--model", "m", "--image", "a.png", "?"], "train"),
    ],
)
def test_without_its_package_a_script_says_what_to_install(script, options, extra):
    command = [sys.executable, "-c", BLOCKED, str(ROOT / "examples" / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert f'pip install -e ".[{extra}]"' in done.stderr
    assert "Traceback" not in done.stderr
