"""Trainers that are killed at random points, continued once, and what is compared."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from mopd.demo import World
from mopd.fault_points import SAVE_POINTS, STEP_POINTS
from mopd.storage.manifest import list_checkpoints
from tests.faults import kills
from tests.helpers.forked import Kill
from tests.helpers.runs import summary, words
from tests.helpers.stub_process import StubProcess

STEPS = 20
SAVE_INTERVAL = 3
STEP_S = 0.15  # about what a step takes


@dataclass(frozen=True, kw_only=True)
class Point:
    """One kill of one run; ``ahead`` samples a step ahead, ``async_save`` saves in a thread."""

    kill: Kill
    ahead: bool
    async_save: bool


def points(seed: int, number: int) -> list[Point]:
    """In turns: a random moment, a step of a save, a moment, a place of an optimizer step."""
    rng = random.Random(seed)
    found = []
    for index in range(number):
        moment = Kill(steps=rng.randrange(0, STEPS - 1), delay_s=rng.uniform(0.0, 2 * STEP_S))
        save = Kill(point=rng.choice(SAVE_POINTS), count=rng.randrange(1, 4))
        step = Kill(point=rng.choice(STEP_POINTS), count=rng.randrange(1, STEPS + 1))
        found.append(
            Point(
                kill=(moment, save, moment, step)[index % 4],
                ahead=bool(index // 2 % 2),
                async_save=bool((index + index // 4) % 2),
            )
        )
    return found


def run_words(
    world: World, directory: Path, name: str, point: Point, stub: StubProcess | None
) -> list[str]:
    """With a ``stub`` the teacher `sort` is a server, so that requests are in flight."""
    settings: dict[str, Any] = {
        "train__steps": STEPS,
        "checkpoint__save_interval": SAVE_INTERVAL,
        "checkpoint__async_save": str(point.async_save).lower(),
        "rollout__max_staleness": int(point.ahead),
        "student__optimizer__lr": 3e-3,
        "evaluate__max_prompts_per_domain": 2,
        "logging__tensorboard": "false",
    }
    if stub is not None:
        settings |= {
            "teachers__sort__backend__type": "vllm",
            "teachers__sort__backend__urls": f"[{stub.url}]",
        }
    return words(world, directory, name, **settings)


def assert_same(run: Path, clean: Path) -> None:
    """Metrics, answers, weights, ledger, and every byte of the last checkpoint's tensors."""
    kills.assert_equal_runs(run, clean, steps=STEPS)
    assert summary(run)["answers"] == summary(clean)["answers"]
    (ours, our_state), (theirs, their_state) = _last(run), _last(clean)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("optimizer.") for name in (key.split(":")[-1] for key in ours))
    for name, tensor in ours.items():
        assert tensor.numpy().tobytes() == theirs[name].numpy().tobytes(), name
    assert our_state == their_state


def _last(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    newest = list_checkpoints(run / "checkpoints")[-1]
    assert newest.step == STEPS
    content = json.loads((newest.path / "state.json").read_text())
    assert content["state"].pop("seconds") > 0
    return load_file(newest.path / "rank-00000.safetensors"), content
