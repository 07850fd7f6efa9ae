"""Which lines of metrics deserve a warning."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mopd.losses.observe import COUNT, SUM
from mopd.runtime.report import first_kl, loss_values, quantiles, warnings_of
from mopd.types import StepBatch

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


def test_every_mean_has_its_own_denominator() -> None:
    batch = StepBatch(
        step=0,
        micro_batches=(),
        denominators={"a": 4.0, "b": 0.0},
        num_tokens=9,
        metrics={},
        num_response_tokens=5,
    )
    sums = {
        "loss/a": 2.0,
        "kl/b": 0.0,
        "loss/cross_entropy": 10.0,
        "chunks/a": 8.0,
        "distance/a": 4.0,
        "moe/max_load": 1.5,
        f"{SUM}topk_mass/a": 6.0,
        f"{COUNT}topk_mass/a": 12.0,
        f"{SUM}top1/a": 0.0,
        f"{COUNT}top1/a": 0.0,
    }
    assert loss_values(sums, batch) == {
        "loss/a": 0.5,  # and no kl/b: that teacher judged nothing
        "loss/cross_entropy": 2.0,
        "distance/a": 0.5,
        "moe/max_load": 1.5,
        "topk_mass/a": 0.5,  # and no top1/a: nothing was measured
    }


def test_quantiles_are_those_of_all_replicas_together() -> None:
    first, second = [1.0, 2.0, 3.0], [4.0, 100.0]
    found = quantiles(
        [
            {"response_length_p95": first, "latency_p50/a": first, "latency_p50/b": []},
            {"response_length_p95": second, "latency_p50/a": second},
        ]
    )
    assert found == {"response_length_p95": pytest.approx(80.8), "latency_p50/a": 3.0}


def test_a_teacher_without_an_answer_in_the_first_step_has_no_distance() -> None:
    batch = StepBatch(
        step=0, micro_batches=(), denominators={"a": 4.0, "b": 0.0}, num_tokens=9, metrics={}
    )
    run: Any = SimpleNamespace(pairs={name: SimpleNamespace(loss="kl") for name in "ab"})
    line = loss_values({"kl/a": 2.0, "kl/b": 0.0}, batch)
    assert first_kl(run, line) == {"a": 0.5}
