"""Whole trainings: their command lines, and the same inside a pool of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mopd.demo import World

ROOT = Path(__file__).resolve().parents[2]
TIMED = ("time/", "phase/", "latency_")
UNTIMED = ("tokens_per_second", "journal_mb")  # and the disk, which a restart finds fuller


def words(world: World, directory: Path, name: str, **overrides: Any) -> list[str]:
    """Command-line words of a short run on ``world``; ``__`` stands for a dot in a key."""
    settings: dict[str, Any] = {
        "run__dir": directory,
        "run__name": name,
        "run__threads": 1,
        "cache_dir": directory / "cache",
        "student__model": world.student,
        "data__path": world.data,
        "data__heldout_path": world.heldout,
        "rollout__max_new_tokens": 14,
        "student__optimizer__lr": 1e-3,
        "train__steps": 4,
        "train__num_prompts_per_step": 8,
        "train__micro_batch_size": 4,
        "checkpoint__save_interval": 4,
        "evaluate__fail_if_not_learned": "false",
        "evaluate__max_prompts_per_domain": 16,
    }
    for teacher, path in world.teachers.items():
        settings[f"teachers__{teacher}__model"] = path
        settings[f"teachers__{teacher}__domains"] = f"[{teacher}]"
    settings |= overrides
    return [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]


def command(recipe: str, overrides: list[str]) -> list[str]:
    return [sys.executable, "launch/train.py", f"recipe={recipe}", *overrides]


def environment() -> dict[str, str]:
    """One thread per process and no network: what the tests promise."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launch(recipe: str, overrides: list[str], *, timeout: float = 240.0) -> Any:
    """Runs ``launch/train.py`` to its end; the completed process with its output as text."""
    return subprocess.run(
        command(recipe, overrides),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@contextmanager
def held(steps: int, until: Path) -> Iterator[None]:
    """Runs of this process wait behind their ``steps``-th step until the file is there: whoever
    interferes with one on its way comes in time, however late."""
    from mopd.runtime import loop

    log_step, logged = loop.log_step, []

    def log(*args: Any, **options: Any) -> None:
        log_step(*args, **options)
        logged.append(1)
        while len(logged) == steps and not until.exists():
            time.sleep(0.01)

    with patch.object(loop, "log_step", log):
        yield


HELD = """
import sys
from pathlib import Path
from tests.helpers.runs import held

sys.path.insert(0, "launch")
from train import main

steps, until, *words = sys.argv[1:]
with held(int(steps), Path(until)):
    sys.exit(main(words))
"""


def start(
    recipe: str,
    overrides: list[str],
    *,
    stdout: int = subprocess.DEVNULL,
    hold: tuple[int, Path] | None = None,
) -> subprocess.Popen[str]:
    """Starts ``launch/train.py``; stderr is kept, stdout is not unless it is asked for.

    Args:
        hold: of `held`.
    """
    words = command(recipe, overrides)
    if hold is not None:
        words = [sys.executable, "-c", HELD, *map(str, hold), *words[2:]]
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment(),
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_here(recipe: str, overrides: list[str]) -> None:
    """The same inside a rank of `tests.helpers.dist`."""
    from mopd.config import load_config
    from mopd.config.check import check_config
    from mopd.runtime.session import run_session

    config = load_config(recipe, overrides)
    check_config(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    run_session(config, world=None)


def step_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(TIMED) and k not in UNTIMED}
        for line in lines
    ]


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())
