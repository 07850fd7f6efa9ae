"""The whole trainer killed at random points, each continued once: bit by bit the undisturbed run.

`SOAK_KILLS` and `SOAK_SEED` in the environment choose how many points, and other ones.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

from mopd.demo import World
from tests.faults import kills
from tests.faults.trainer_kills import STEPS, Point, assert_same, points, run_words
from tests.helpers.forked import Kill, Trainer, run_trainers

KILLS = int(os.environ.get("SOAK_KILLS", "20"))
SEED = int(os.environ.get("SOAK_SEED", "1"))


def test_a_trainer_that_is_killed_anywhere_changes_nothing(
    tiny_world: World, tmp_path: Path
) -> None:
    """In saves, in optimizer steps, and with requests to a teacher's server in flight."""
    plan = points(SEED, KILLS)
    began = time.monotonic()
    with kills.stub(tiny_world, delay_s=0.02) as stub:
        clean = [
            Trainer(
                overrides=run_words(
                    tiny_world,
                    tmp_path,
                    f"clean-{int(ahead)}",
                    Point(kill=Kill(), ahead=ahead, async_save=False),
                    stub,
                ),
                run=tmp_path / f"clean-{int(ahead)}",
            )
            for ahead in (False, True)
        ]
        launches = []
        for number, point in enumerate(plan):
            name = f"hit-{number}"
            overrides = run_words(tiny_world, tmp_path, name, point, stub)
            for kill in (point.kill, None):
                launches.append(Trainer(overrides=overrides, run=tmp_path / name, kill=kill))
        ended = run_trainers([*clean, *launches], timeout=1800)
    assert [(one.code, one.errors) for one in ended[:2]] == [(0, "")] * 2
    killed, again = ended[2::2], ended[3::2]
    seconds = time.monotonic() - began
    kinds = Counter(point.kill.point.partition(".")[0] or "moment" for point in plan)
    hits = [one.code == -signal.SIGKILL for one in killed]
    figures = {
        "kills": sum(hits),
        "by kind": kinds,
        "steps at the kill": [one.steps for one in killed],
        "async": sum(point.async_save for point in plan),
        "ahead": sum(point.ahead for point in plan),
        "continued from a checkpoint": sum("continuing from step" in one.output for one in again),
        "seconds": round(seconds),
    }
    print(json.dumps(figures))
    assert all(hits), figures
    for number, (point, one) in enumerate(zip(plan, again, strict=True)):
        assert (one.code, one.errors) == (0, ""), (number, point)
        assert_same(tmp_path / f"hit-{number}", tmp_path / f"clean-{int(point.ahead)}")
    assert all(one.steps <= STEPS for one in killed)
