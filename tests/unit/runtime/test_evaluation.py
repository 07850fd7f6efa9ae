"""What goes by evaluations: scores, the best of them, patience; batches of held-out prompts."""

from __future__ import annotations

import json
import math
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from mopd.config.schema import RunConfig
from mopd.errors import ConfigError
from mopd.runtime.ahead import Ahead
from mopd.runtime.evaluate import batches_of
from mopd.runtime.evaluation import (
    Evaluation,
    best,
    is_due,
    patience_is_over,
    refuse_unmeasured,
)
from mopd.runtime.gather import Gathered
from mopd.types import Prompt


def evaluation(step: int, value: float, **metrics: float) -> Evaluation:
    scores = {"a": {"accuracy": value, "canonical": 1.0, "prompts": 8.0}}
    return Evaluation(step=step, scores=scores, metrics=metrics)


def config(**section: Any) -> RunConfig:
    return RunConfig.model_validate({"evaluate": section, "train": {"steps": 10}})


def test_the_higher_score_is_the_better() -> None:
    found = Evaluation(
        step=1,
        scores={
            "a": {"accuracy": 0.2, "canonical": 1.0, "prompts": 1.0},
            "b": {"accuracy": 0.6, "canonical": 1.0, "prompts": 9.0},
        },
        metrics={"eval/kl/x": 1.0, "eval/kl/y": 3.0, "eval/validation_kl/x": 7.0, "eval/loss": 5.0},
    )
    assert found.score("accuracy") == pytest.approx(0.4)
    assert found.score("kl") == -2.0 and found.score("loss") == -5.0
    assert Evaluation(step=1).score("kl") is None
    assert Evaluation(step=1, metrics={"eval/loss": math.nan}).score("loss") is None
    assert found.line["eval/accuracy/b"] == 0.6 and found.line["eval/kl/y"] == 3.0
    assert Evaluation.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert "\n" not in found.describe() and "after 1 steps" in found.describe()


def test_the_first_of_equal_scores_is_the_best() -> None:
    found = [evaluation(0, 0.1), evaluation(5, 0.4), evaluation(10, 0.4), evaluation(15, 0.3)]
    top = best(found, "accuracy")
    assert top is not None and top.step == 5
    assert best(found, "kl") is None
    assert best([evaluation(0, 0.0)], "accuracy") is not None


def test_patience_counts_evaluations_without_a_better_one() -> None:
    found = [evaluation(0, 0.1), evaluation(5, 0.4), evaluation(10, 0.4), evaluation(15, 0.3)]
    assert patience_is_over(config(patience=2), found)
    assert not patience_is_over(config(patience=2), found[:3])
    assert not patience_is_over(config(patience=3), found)
    assert not patience_is_over(config(patience=2), [*found, evaluation(20, 0.5)])
    assert not patience_is_over(config(), found * 9)


def test_what_goes_by_evaluations_needs_a_number() -> None:
    unanswered = Evaluation(step=0, metrics={"eval/kl/x": 1.0})
    refuse_unmeasured(config(), unanswered)
    refuse_unmeasured(config(patience=1, metric="kl"), unanswered)
    for metric in ("accuracy", "loss"):
        with pytest.raises(ConfigError, match=f"evaluate.metric={metric}: evaluate.patience=1"):
            refuse_unmeasured(config(patience=1, metric=metric), unanswered)


def test_when_an_evaluation_is_due() -> None:
    assert [step for step in range(11) if is_due(config(interval=4), step)] == [0, 4, 8, 10]
    assert not any(is_due(config(), step) for step in range(11))


def prompts(domain: str, count: int) -> list[Prompt]:
    return [Prompt(id=f"{domain}{n}", messages=(), domain=domain) for n in range(count)]


def test_batches_take_turns_between_domains() -> None:
    rows = [*prompts("b", 5), *prompts("a", 2)]
    found = batches_of(rows, per_domain=3, size=2)
    assert [[p.id for p in batch] for batch in found] == [["a0", "b0"], ["a1", "b1"], ["b2"]]
    assert batches_of([], per_domain=3, size=2) == []


def test_nothing_is_asked_while_an_evaluation_pauses_the_thread() -> None:
    asked: list[str] = []
    scoring, go_on = threading.Event(), threading.Event()

    def sample(step: int, *, version: int) -> list:
        asked.append(f"sample {step}")
        return []

    def score(step: int, rollouts: list) -> Gathered:
        scoring.set()
        assert go_on.wait(10)
        asked.append(f"score {step}")
        return Gathered(step=step, rollouts=[], scores=[])

    gatherer: Any = SimpleNamespace(sample=sample, score=score)
    ahead = Ahead(gatherer, lag=1, num_steps=3)
    ahead.start(0)
    ahead.after_push(0)
    try:
        assert scoring.wait(10)
        threading.Timer(0.05, go_on.set).start()
        with ahead.paused():  # what was begun has ended, and the next does not begin
            before = list(asked)
            threading.Event().wait(0.1)
            assert asked == before and len(before) % 2 == 0
        assert ahead.take(0).step == 0 and ahead.take(1).step == 1
    finally:
        ahead.close()
