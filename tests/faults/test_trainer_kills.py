"""The trainer is killed (SIGKILL): the same command goes on, and nothing shows that it was."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from mopd.demo import World
from tests.faults.trainer_kills import Point, assert_same, run_words
from tests.helpers.forked import Kill, Trainer, run_trainers

pytestmark = [pytest.mark.dist, pytest.mark.e2e]

KILLS = [
    Kill(point="step.weights.changed", count=5),
    Kill(point="save.shard.written", count=2),
    Kill(steps=13, delay_s=0.05),
]


def test_three_kills_of_one_run_change_nothing(tiny_world: World, tmp_path: Path) -> None:
    """In an optimizer step, in a save of a thread, and at any moment."""
    point = Point(kill=KILLS[0], ahead=True, async_save=True)
    clean, hit = (run_words(tiny_world, tmp_path, name, point, None) for name in ("clean", "hit"))
    run = tmp_path / "hit"
    launches = [Trainer(overrides=hit, run=run, kill=kill) for kill in (*KILLS, None)]
    first = Trainer(overrides=clean, run=tmp_path / "clean")
    whole, *killed, last = run_trainers([first, *launches])
    assert (whole.code, whole.errors) == (last.code, last.errors) == (0, "")
    assert [ended.code for ended in killed] == [-signal.SIGKILL] * 3
    assert killed[0].steps == 4 and killed[2].steps >= 13
    assert "continuing from step" in last.output
    assert_same(run, tmp_path / "clean")
