"""Runs in Ray mode: their words, and who is which process."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from mopd.demo import World
from tests.helpers import runs
from tests.helpers.small_server import is_gone

TP2 = {"student__parallel__tensor_model_parallel_size": 2}


def words(world: World, directory: Path, name: str, *, address: str, **overrides: Any) -> list[str]:
    """Of a short run with a student of two ranks."""
    settings = {"launcher": "ray", "ray__address": address, **TP2, **overrides}
    return runs.words(world, directory, name, **settings)


def processes(run: Path) -> dict[str, int]:
    """Process ids by name, as in `rank 0`; empty while there are none."""
    path = run / "servers" / "processes.json"
    if not path.exists():
        return {}
    return {name: pid for name, (_, pid) in json.loads(path.read_text()).items()}


def steps_of(run: Path) -> int:
    """Steps that have a line in metrics.jsonl."""
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str], *, seconds: float) -> None:
    """Until so many steps are done, while the run lives."""
    deadline = time.monotonic() + seconds
    while steps_of(run) < step:
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < deadline, f"step {step} is not reached"
        time.sleep(0.02)


def none_left(pids: list[int], *, seconds: float = 20.0) -> bool:
    """Whether all of them are gone within a moment."""
    deadline = time.monotonic() + seconds
    while not all(map(is_gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return all(map(is_gone, pids))
