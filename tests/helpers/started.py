"""Trainings whose servers mopd started, seen from outside."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.helpers.runs import start

RUN_SECONDS = 280.0


@contextmanager
def running(
    recipe: str, overrides: list[str], *, hold: tuple[int, Path] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A run with its output; it does not outlive the block. ``hold`` is that of `start`."""
    process = start(recipe, overrides, stdout=subprocess.PIPE, hold=hold)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_steps(process: subprocess.Popen[str], metrics: Path, count: int) -> None:
    """Until the run has logged ``count`` steps; fails when it ends before."""
    deadline = time.monotonic() + RUN_SECONDS
    while not metrics.exists() or metrics.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def servers_of(trainer: int) -> list[psutil.Process]:
    """The leaders of vLLM's process groups: children of the guards."""
    guards = [
        child
        for child in psutil.Process(trainer).children()
        if any(word.endswith("guard.py") for word in child.cmdline())
    ]
    return [server for guard in guards for server in guard.children()]
