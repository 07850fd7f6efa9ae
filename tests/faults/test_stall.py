"""A run that is stuck ends itself and says where."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mopd.demo import World
from tests.helpers.dist import run_ranks
from tests.helpers.runs import launch, step_lines, train_here, words

pytestmark = [pytest.mark.e2e, pytest.mark.dist]

STALL_S = 8.0


def run_words(world: World, directory: Path, teacher: str, *, steps: int) -> list[str]:
    return words(
        world,
        directory,
        "run",
        run__stall_s=STALL_S,
        distillation__loss="opd",
        teachers__sort__backend__type="custom",
        teachers__sort__backend__target=f"tests.helpers.stuck:{teacher}",
        train__steps=steps,
        logging__tensorboard="false",
    )


@pytest.mark.parametrize("teacher", ["Sleeper", "Hog"])
def test_a_stuck_run_ends_with_its_stacks(tiny_world: World, tmp_path: Path, teacher: str) -> None:
    began = time.monotonic()
    done = launch("mopd_ctkd", run_words(tiny_world, tmp_path, teacher, steps=4), timeout=120)
    assert time.monotonic() - began < 100.0
    assert done.returncode == 1
    assert len(step_lines(tmp_path / "run")) == 2
    stacks = (tmp_path / "run" / "stall-0.txt").read_text()
    assert "stuck.py" in stacks and "in stop_for_ever" in stacks and "in take" in stacks
    if teacher == "Sleeper":
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(said) == 1
        assert "nothing was finished for 8 s" in said[0] and "raise run.stall_s" in said[0]
        assert "in stop_for_ever" in done.stderr


def test_a_slow_run_is_left_alone(tiny_world: World, tmp_path: Path) -> None:
    """It takes longer than `run.stall_s` as a whole, and no step does."""
    arguments = run_words(tiny_world, tmp_path, "Slow", steps=10)
    run_ranks(train_here, 1, "mopd_ctkd", arguments, timeout=120)
    assert len(step_lines(tmp_path / "run")) == 10
    assert not list((tmp_path / "run").glob("stall-*"))
