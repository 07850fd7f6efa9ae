"""A scratch checkout in which the documentation's commands are run.

Trainings, `mopd` and python blocks are forks of one warm process, which spares each of them the
seconds of its imports; everything else is run by bash.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from mopd.demo import World
from tests.helpers.doc_commands import SHELL, TRAIN
from tests.helpers.runs import ROOT, environment

GIVE_UP_S = 150.0
SHARED = ("launch", "recipes", "docs", "mopd", "Makefile", "pyproject.toml", "constraints.txt")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended, and all that it wrote to stdout and stderr."""

    code: int
    output: str


def make_scratch(directory: Path, world: World) -> Path:
    """The checkout as links; `runs` and `.cache` are its own, with the embedded world inside."""
    for name in SHARED:
        (directory / name).symlink_to(ROOT / name)
    (directory / ".venv").symlink_to(sys.prefix)
    worlds = directory / ".cache" / "mopd" / "world"
    worlds.mkdir(parents=True)
    (worlds / world.path.name).symlink_to(world.path)
    return directory


def run_command(command: str, directory: Path) -> Ended:
    """One command in ``directory``, by its words alone where no shell is needed."""
    words = [] if SHELL.search(command) else shlex.split(command)
    program = Path(words[0]).name if words else ""
    if program == "python" and words[1:2] == [TRAIN]:
        return _forked("train", words[2:], directory)
    if program == "mopd":
        return _forked("mopd", words[1:], directory)
    return _in_bash(command, directory)


def run_python(source: str, directory: Path, *, before: Sequence[str] = ()) -> Ended:
    """A block of Python, in a process of its own, where the blocks ``before`` it were run too."""
    return _forked("python", [*before, source], directory)


def _in_bash(script: str, directory: Path) -> Ended:
    ran = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=directory,
        env=_environment(directory),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=GIVE_UP_S,
    )
    return Ended(code=ran.returncode, output=ran.stdout)


def _environment(directory: Path) -> dict[str, str]:
    """The virtual environment is active, as after `source .venv/bin/activate`."""
    path = f"{directory / '.venv' / 'bin'}:{os.environ.get('PATH', '')}"
    return environment() | {"PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


def _forked(kind: str, words: list[str], directory: Path) -> Ended:
    code, output = _warm().submit(_run, kind, words, directory).result(GIVE_UP_S + 30)
    return Ended(code=code, output=output)


@functools.cache
def _warm() -> ProcessPoolExecutor:
    """It imports and forks, and never computes; it ends with pytest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("COLUMNS", "120")
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()
    return pool


def _run(kind: str, words: list[str], directory: Path) -> tuple[int, str]:
    import transformers  # noqa: F401  # before the forks, not in each of them

    import mopd.runtime.session  # noqa: F401

    written = directory / ".output"
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = _in_child(kind, words, directory, written)
        finally:
            os._exit(code)
    end = time.monotonic() + GIVE_UP_S
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), written.read_text(errors="replace")
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 124, written.read_text(errors="replace")
        time.sleep(0.01)


def _in_child(kind: str, words: list[str], directory: Path, written: Path) -> int:
    os.chdir(directory)
    file = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_USE_AGENT_STORE"):
        os.environ.pop(name, None)
    sys.stdin = open(os.devnull)  # noqa: SIM115  # as long as the process
    try:
        return _call(kind, words)
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 98
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _call(kind: str, words: list[str]) -> int:
    if kind == "train":
        from launch import train

        return train.main(words)
    if kind == "mopd":
        from mopd.cli.main import main

        return main(words)
    names = {"__name__": "__main__"}  # of all blocks of a page, as in a notebook
    for block in words[:-1]:
        with redirect_stdout(io.StringIO()):
            exec(compile(block, "<earlier block of the page>", "exec"), names)
    exec(compile(words[-1], "<block of the page>", "exec"), names)
    return 0
