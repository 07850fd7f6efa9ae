"""The phases of a step add up to the step, also where sampling overlaps training."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mopd.metrics.phases import PHASES, phases

TIMES = {
    "time/step": 20.0,
    "time/gather": 9.0,
    "time/rollout": 5.0,
    "time/teachers": 3.0,
    "time/journal": 0.75,
    "time/inside": 1.0,
    "time/align": 2.0,
    "time/align/wait": 0.5,
    "time/broadcast": 0.25,
    "time/turn": 0.125,
    "time/train": 4.0,
    "time/sync": 2.0,
    "time/sync/wait": 1.5,
    "time/evaluate": 100.0,
}


def test_alone_every_second_is_where_it_was_spent() -> None:
    assert phases(TIMES, ahead=False) == {
        "phase/rollout": 5.0,
        "phase/teachers": 4.0,
        "phase/align": 1.75,
        "phase/train": 4.0,
        "phase/sync": 0.5,
        "phase/wait": 2.125,
        "phase/other": 2.625,
    }


def test_ahead_counts_what_the_loop_waited() -> None:
    found = phases(TIMES | {"time/rollout": 50.0, "time/teachers": 40.0}, ahead=True)
    assert found["phase/rollout"] == 0.0
    assert found["phase/teachers"] == 1.0, "those on the student's ranks are in the loop"
    assert found["phase/wait"] == 0.5 + 1.5 + 0.125 + 9.0
    assert sum(found.values()) == 20.0


@given(st.lists(st.floats(0, 100), min_size=8, max_size=8), st.booleans())
def test_they_add_up(seconds: list[float], ahead: bool) -> None:
    rollout, teachers, journal, inside, align, train, sync, rest = seconds
    waited = 7.0 if ahead else rollout + teachers + journal
    line = {
        "time/rollout": rollout,
        "time/teachers": teachers,
        "time/gather": waited,
        "time/inside": inside,
        "time/align": align,
        "time/align/wait": align / 3,
        "time/train": train,
        "time/sync": sync,
        "time/sync/wait": sync / 2,
        "time/step": waited + inside + align + train + sync + rest,
    }
    found = phases(line, ahead=ahead)
    assert list(found) == [f"phase/{name}" for name in PHASES]
    assert all(value >= 0 for value in found.values())
    assert sum(found.values()) == pytest.approx(line["time/step"])
