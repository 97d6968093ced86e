"""What the tests rely on themselves: a test that crashes or hangs ends the run as a failure, and soon."""

import subprocess
import sys
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
    [(CRASH, "crashed while running"), (SLEEP, "Timeout (>2.0s)"), (DEADLOCK, "crashed while running")],
    ids=["crash", "sleep", "deadlock"],
)
def test_a_broken_test_ends_the_run_as_a_failure(tmp_path, code, message):
    (tmp_path / "test_broken.py").write_text(code)
    for name in "abc":
        (tmp_path / f"test_{name}.py").write_text("def test_1():\n    pass\n\ndef test_2():\n    pass\n")
    # The settings of this project, but for the limits, which are short
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "setup.cfg", "--rootdir", tmp_path, tmp_path]
    command += ["-p", "no:cacheprovider", "-o", "timeout=2", "-o", "faulthandler_timeout=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stdout
    assert message in done.stdout
    assert "1 failed, 6 passed" in done.stdout
