"""Which lines of metrics deserve a warning."""

from __future__ import annotations

import pytest

from mopd.runtime.report import warnings_of

QUIET = {"masked": 0.05, "scored/sort": 0.9, "rescored/nats": 0.1, "rescored/other_tokens": 0.0}


def warnings(**changes: float) -> list[str]:
    line = {**QUIET, **{key.replace("__", "/"): value for key, value in changes.items()}}
    return list(warnings_of(line, ["sort", "upper"]))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"masked": 0.06}, "6% of the response tokens have no teacher"),
        ({"scored__sort": 0.5}, "teachers.sort scored only 50%"),
        ({"rescored__nats": 0.4}, "0.4 nats an answer away"),
        ({"dropped__truncated": 0.3, "dropped__stale": 0.3}, "60% of the answers are not trained"),
        ({"rescored__other_tokens": 1.0}, "is it the same model"),
    ],
)
def test_each_cause_has_its_warning(changes: dict[str, float], text: str) -> None:
    assert warnings() == []
    (found,) = warnings(**changes)
    assert text in found


def test_a_step_without_a_token_has_nothing_to_warn_of() -> None:
    assert list(warnings_of({}, ["sort"])) == []
