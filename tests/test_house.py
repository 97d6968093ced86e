"""What the tests rely on themselves, and the pages: a broken test ends the run, and what the README names is there."""

import ast
import importlib.util
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
CRASH = "import os, signal\n\ndef test_it():\n    os.kill(os.getpid(), signal.SIGSEGV)\n"
SLEEP = "import time\n\ndef test_it():\n    time.sleep(600)\n"
# A mutex that is locked twice: no signal ends that, and no other thread of Python runs meanwhile
DEADLOCK = (
    "import ctypes\n\ndef test_it():\n    mutex = ctypes.create_string_buffer(64)\n"
    "    ctypes.PyDLL(None).pthread_mutex_lock(mutex)\n    ctypes.PyDLL(None).pthread_mutex_lock(mutex)\n"
)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("code", "message"),
    [(CRASH, "crashed while running"), (SLEEP, "Timeout (>6.0s)"), (DEADLOCK, "crashed while running")],
    ids=["crash", "sleep", "deadlock"],
)
def test_a_broken_test_ends_the_run_as_a_failure(tmp_path, code, message):
    (tmp_path / "test_broken.py").write_text(code)
    for name in "abc":
        (tmp_path / f"test_{name}.py").write_text("def test_1():\n    pass\n\ndef test_2():\n    pass\n")
    # The settings of this project, but for the limits, which are short
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "setup.cfg", "--rootdir", tmp_path, tmp_path]
    command += ["-p", "no:cacheprovider", "-o", "timeout=6", "-o", "faulthandler_timeout=9"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stdout
    assert message in done.stdout
    assert "1 failed, 6 passed" in done.stdout


PAGES = [ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\((?!https?:)([^)#]+)", prose)
    assert [link for link in links if not (page.parent / link).exists()] == []
    for language, code in blocks:
        if language == "python":
            ast.parse(textwrap.dedent(code))
    scripts = re.findall(r"\b((?:examples|convert|benchmarks|tests|minimind_v_hf|notebooks)/[\w/]+\.\w+)", text)
    assert [script for script in scripts if not (ROOT / script).exists()] == []
    modules = re.findall(r"python -m (minimind_v_hf[\w.]*)", text)
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


def test_the_readmes_are_short_and_alike():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))
    assert len(english.splitlines()) <= 200
    assert len(chinese.splitlines()) <= 200
    for mark in (r"^#+ ", r"^\|", r"^```", r"^\* ", r"^!\["):
        assert len(re.findall(mark, english, re.MULTILINE)) == len(re.findall(mark, chinese, re.MULTILINE))
    # The same commands, but for the words in them and the comments
    commands = r"^(?:python|accelerate|transformers|pip) \S+ \S+"
    assert re.findall(commands, english, re.MULTILINE) == re.findall(commands, chinese, re.MULTILINE)
