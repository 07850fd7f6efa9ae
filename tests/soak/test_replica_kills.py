"""Many steps with one of two replicas killed or hung at random points: bit by bit the same.

`SOAK_STEPS` and `SOAK_SEED` in the environment choose another length and other points.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from mopd.demo import World
from tests.faults import kills
from tests.helpers.runs import launch

STEPS = int(os.environ.get("SOAK_STEPS", "200"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
STEPS_PER_BLOW = 15


@pytest.mark.parametrize("kind", ["model", "prefix"])
def test_replicas_that_fail_at_random_points_change_nothing(
    tiny_world: World, tmp_path: Path, kind: str
) -> None:
    """With kills and hangs; the servers score by the teacher's own model, or by a hash."""
    plan = kills.blows(SEED, steps=STEPS, number=max(2, STEPS // STEPS_PER_BLOW), hangs=True)
    with ExitStack() as stack:
        stubs = [
            stack.enter_context(kills.stub(tiny_world, scored_by_model=kind == "model"))
            for _ in range(2)
        ]
        arguments = {"train__steps": STEPS, "checkpoint__save_interval": 50}
        began = time.monotonic()
        clean = launch(
            "mopd_ctkd",
            kills.run_words(tiny_world, tmp_path, "clean", stubs, **arguments),
            timeout=kills.GIVE_UP_S + STEPS,
        )
        assert clean.returncode == 0, clean.stderr
        middle = time.monotonic()
        overrides = kills.run_words(tiny_world, tmp_path, "hit", stubs, **arguments)
        ended = kills.disturbed(overrides, tmp_path / "hit", stubs, plan)
        seconds = time.monotonic() - middle
    assert (ended.code, ended.errors) == (0, "")
    longest = kills.longest_step(tmp_path / "hit")
    figures = {
        "teacher": kind,
        "steps": STEPS,
        "kills": sum(not blow.hang for blow in plan),
        "hangs": sum(blow.hang for blow in plan),
        "failed requests": kills.failures(tmp_path / "hit"),
        "longest step": longest,
        "longest step of the clean run": kills.longest_step(tmp_path / "clean"),
        "seconds": seconds,
        "seconds of the clean run": middle - began,
    }
    print(json.dumps(figures))
    kills.assert_equal_runs(tmp_path / "hit", tmp_path / "clean", steps=STEPS)
    assert kills.failures(tmp_path / "hit").total() >= len(plan)
    assert longest < kills.STALL_S
