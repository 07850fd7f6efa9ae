"""The watchdog alone, in processes that it may end."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT

LIMIT_S = 1.5

HEAD = f"""
import sys, threading, time
from pathlib import Path
from mopd.runtime import watchdog
from mopd.runtime.watchdog import Watchdog
directory = Path(sys.argv[1])
dog = Watchdog({LIMIT_S}, directory=directory, rank=3)
def stuck():
    time.sleep(600)
"""


def run(tmp_path: Path, body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HEAD + body, str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_silence_ends_the_process_and_names_every_thread(tmp_path: Path) -> None:
    body = """
threading.Thread(target=stuck, daemon=True).start()
with dog:
    print("begun")
    threading.Event().wait(600)
"""
    done = run(tmp_path, body)
    assert done.returncode == 1 and done.stdout == "begun\n"
    stacks = (tmp_path / "run" / "stall-3.txt").read_text()
    assert stacks.count("Thread 0x") >= 2 and "in stuck" in stacks and "<module>" in stacks
    assert done.stderr.count("error: rank 3: nothing was finished for 1.5 s") == 1
    assert "in stuck" in done.stderr


def test_progress_keeps_it_quiet_and_nothing_is_left(tmp_path: Path) -> None:
    body = f"""
with dog:
    for _ in range(12):
        time.sleep({LIMIT_S / 8})
        dog.feed()
print(sorted(path.name for path in directory.iterdir()), threading.active_count())
time.sleep({LIMIT_S * 1.5})
"""
    done = run(tmp_path, body)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[] 1\n", "")


def test_an_error_in_the_run_is_not_hidden(tmp_path: Path) -> None:
    done = run(tmp_path, "with dog:\n    raise KeyError('mine')\n")
    assert done.returncode == 1 and "KeyError: 'mine'" in done.stderr
    assert not list((tmp_path / "run").iterdir())


def test_zero_waits_for_ever(tmp_path: Path) -> None:
    body = f"""
with Watchdog(0.0, directory=directory, rank=0) as dog:
    time.sleep({LIMIT_S * 1.5})
    dog.feed()
    print(threading.active_count(), directory.exists())
"""
    done = run(tmp_path, body)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 False\n", "")


def test_a_thread_that_keeps_the_interpreter_is_ended_too(tmp_path: Path) -> None:
    body = """
import re
watchdog.BACKSTOP_S = 0.5
with dog:
    re.match(r"(a+)+b", "a" * 64)
"""
    began = time.monotonic()
    done = run(tmp_path, body)
    assert done.returncode == 1 and time.monotonic() - began < 50.0
    assert "<module>" in (tmp_path / "run" / "stall-3.txt").read_text()


@pytest.mark.parametrize("stream", ["stderr", "stdout"])
def test_a_closed_stream_does_not_keep_it_alive(tmp_path: Path, stream: str) -> None:
    done = run(tmp_path, f"sys.{stream}.close()\nwith dog:\n    stuck()\n")
    assert done.returncode == 1
    assert "in stuck" in (tmp_path / "run" / "stall-3.txt").read_text()
