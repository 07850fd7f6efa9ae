"""A guarded command leaves no process behind, however its starter ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mopd.serving import guard as shipped
from tests.helpers.small_server import is_gone
from tests.helpers.vllm_server import stop

GUARD = shipped.__file__

TREE = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""
STARTER = """
import os, subprocess, sys, time
guard = subprocess.Popen([sys.executable, "-I", sys.argv[1], sys.executable, "-c", sys.argv[2]],
                         stdin=subprocess.PIPE, start_new_session=True)
if sys.argv[3] == "fork" and not os.fork():
    os.close(1)
    time.sleep(10)  # a fork of the starter that outlives it, and the pipe with it
    os._exit(0)
time.sleep(60)
"""


def wait_until_gone(pid: int, *, seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if is_gone(pid):
            return True
        time.sleep(0.05)
    return False


def test_closing_the_pipe_ends_the_group() -> None:
    guard = subprocess.Popen(
        [sys.executable, "-I", GUARD, sys.executable, "-c", TREE],
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


@pytest.mark.parametrize("also", ["nothing", "fork"])
def test_a_killed_starter_ends_the_group(also: str) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, GUARD, TREE, also], stdout=subprocess.PIPE
    )
    assert starter.stdout is not None
    grandchild = int(starter.stdout.readline())
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    assert wait_until_gone(grandchild, seconds=8.0)


def test_a_killed_starter_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "of the command"
    (folder / "below").mkdir(parents=True)
    monkeypatch.setenv(shipped.FOLDER_VARIABLE, str(folder))
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, GUARD, TREE, "nothing"], stdout=subprocess.PIPE
    )
    assert starter.stdout is not None
    grandchild = int(starter.stdout.readline())
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    assert wait_until_gone(grandchild, seconds=8.0)
    deadline = time.monotonic() + 8.0
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not folder.exists()


def test_a_command_that_ends_leaves_its_folder_to_its_starter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(shipped.FOLDER_VARIABLE, str(tmp_path))
    said = f"import os; print({shipped.FOLDER_VARIABLE!r} in os.environ)"  # guards below have none
    words = [sys.executable, "-I", GUARD, sys.executable, "-c", said]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guard:
        assert guard.stdout is not None
        assert guard.stdout.read() == b"False\n"
        assert guard.wait(timeout=30) == 0
    assert tmp_path.exists()


@pytest.mark.parametrize(
    ("end", "code"),
    [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 128 + 9)],
)
def test_a_command_that_ends_gives_its_code(end: str, code: int) -> None:
    words = [sys.executable, "-I", GUARD, sys.executable, "-c", end]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as guard:
        assert guard.wait(timeout=30) == code
