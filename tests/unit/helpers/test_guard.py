"""A guarded command leaves no process behind, however its starter ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.vllm_server import GUARD, stop, vllm_python

TREE = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""
STARTER = """
import subprocess, sys, time
guard = subprocess.Popen([sys.executable, sys.argv[1], sys.executable, "-c", sys.argv[2]],
                         stdin=subprocess.PIPE, start_new_session=True)
time.sleep(60)
"""


def wait_until_gone(pid: int, *, seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_closing_the_pipe_ends_the_group() -> None:
    guard = subprocess.Popen(
        [sys.executable, str(GUARD), sys.executable, "-c", TREE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert guard.stdout is not None
    grandchild = int(guard.stdout.readline())
    assert psutil.pid_exists(grandchild)
    stop(guard)
    guard.stdout.close()
    assert wait_until_gone(grandchild)


def test_a_killed_starter_ends_the_group() -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(GUARD), TREE], stdout=subprocess.PIPE
    )
    assert starter.stdout is not None
    grandchild = int(starter.stdout.readline())
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    assert wait_until_gone(grandchild)


def test_a_command_that_ends_gives_its_code() -> None:
    words = [sys.executable, str(GUARD), sys.executable, "-c", "raise SystemExit(7)"]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as guard:
        assert guard.wait(timeout=30) == 7


@pytest.mark.parametrize("in_ci", [True, False])
def test_a_missing_server_skips_or_fails_in_ci(
    in_ci: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.helpers.vllm_server.VENV", tmp_path)
    monkeypatch.setitem(os.environ, "CI", "true" if in_ci else "")
    with pytest.raises(pytest.fail.Exception if in_ci else pytest.skip.Exception, match="setup"):
        vllm_python()
