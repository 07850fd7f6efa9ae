"""Whole trainers as forks of one warm process: a process each, without the seconds of its imports.

The warm process imports and forks, and nothing else: a fork of a process that has computed lacks
the threads that it computed with.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from mopd import fault_points

Prepare = Callable[[], None]
GIVE_UP_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Kill:
    """SIGKILL the ``count``-th time ``point`` comes by, or ``delay_s`` after ``steps`` steps."""

    point: str = ""
    count: int = 1
    steps: int = 0
    delay_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """One launch of `launch/train.py`; ``prepare`` runs in its process first."""

    overrides: list[str]
    run: Path
    kill: Kill | None = None
    prepare: Prepare | None = None
    recipe: str = "mopd_ctkd"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """``code`` is negative for a signal. ``steps`` are logged by then."""

    code: int
    output: str
    errors: str
    steps: int


def run_trainers(trainers: list[Trainer], *, timeout: float = 200.0) -> list[Ended]:
    """One after the other."""
    return _warm().submit(_run_all, trainers).result(timeout)


@functools.cache
def _warm() -> ProcessPoolExecutor:
    """For the whole session; it ends with pytest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()  # it has started, with this environment
    return pool


def _run_all(trainers: list[Trainer]) -> list[Ended]:
    import transformers  # noqa: F401  # before the forks, not in each of them

    import mopd.runtime.session  # noqa: F401

    return [_run_one(trainer) for trainer in trainers]


def _run_one(trainer: Trainer) -> Ended:
    trainer.run.parent.mkdir(parents=True, exist_ok=True)
    outputs = [trainer.run.parent / f"{trainer.run.name}.{name}" for name in ("out", "err")]
    for path in outputs:
        path.write_bytes(b"")  # a kill may come before the child opens it
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = _in_child(trainer, outputs)
        finally:
            os._exit(code)
    status = _wait(child, trainer)
    output, errors = (path.read_text() for path in outputs)
    code = os.waitstatus_to_exitcode(status)
    return Ended(code=code, output=output, errors=errors, steps=_steps(trainer.run))


def _in_child(trainer: Trainer, outputs: list[Path]) -> int:
    import sys

    from launch import train

    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_USE_AGENT_STORE"):
        os.environ.pop(name, None)
    if trainer.kill is not None and trainer.kill.point:
        fault_points.install(fault_points.killer(trainer.kill.point, trainer.kill.count))
    if trainer.prepare is not None:
        trainer.prepare()
    try:
        return train.main([f"recipe={trainer.recipe}", *trainer.overrides])
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 98
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _wait(child: int, trainer: Trainer) -> int:
    """The wait status, after the blow if there is one."""
    kill, end = trainer.kill, time.monotonic() + GIVE_UP_S
    blow_at = None
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            raise TimeoutError(f"{trainer.run} did not end in {GIVE_UP_S} s")
        if kill is not None and not kill.point:
            if blow_at is None and _steps(trainer.run) >= kill.steps:
                blow_at = time.monotonic() + kill.delay_s
            if blow_at is not None and time.monotonic() >= blow_at:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def _steps(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0
