"""Held-out scores and the verdict, without models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from torch import Tensor

from mopd.demo import World
from mopd.rollout.base import make_rollout
from mopd.runtime.evaluate import (
    Scores,
    by_domain,
    has_learned,
    results,
    student_scores,
    teacher_scores,
)
from mopd.serving.generation import Generated
from mopd.teachers.uniform import UniformTeacher
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout


def prompt(name: str, domain: str, answer: str | None = "ab") -> Prompt:
    return Prompt(id=name, messages=(), domain=domain, answer=answer, teachers=("t",))


class Scripted:
    """A sampler whose answer is the last part of the prompt's id, as single characters or not."""

    version = 0

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self.asked: list[str] = []

    def answer(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        self.asked += [p.id for p in prompts]
        return [self._rollout(p) for p in prompts]

    def _rollout(self, asked: Prompt) -> Rollout:
        vocabulary = self._tokenizer.vocabulary
        ids = [*vocabulary.encode(asked.id.split("-")[1].encode()), vocabulary.eos_id]
        generated = Generated(
            token_ids=np.array(ids, dtype=np.int32),
            logprobs=np.zeros(len(ids), dtype=np.float32),
            stopped=True,
        )
        return make_rollout(
            asked,
            generated,
            tokenizer=self._tokenizer,
            prompt_ids=np.zeros(1, dtype=np.int32),
            sample_index=0,
            version=0,
        )

    def generate(self, prompts: Sequence[Prompt], *, version: int) -> list[Rollout]:
        return self.answer(prompts)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None: ...

    def close(self) -> None: ...


class Fixed(UniformTeacher):
    """Has an accuracy, and counts what it was asked."""

    def __init__(self, value: float | None, tokenizer: ChatTokenizer) -> None:
        super().__init__("t", tokenizer=tokenizer, student=tokenizer, top_k=1)
        self._value = value

    def accuracy(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> float | None:
        return self._value


def test_only_checkable_prompts_count_up_to_the_limit() -> None:
    prompts = [prompt("1", "b"), prompt("2", "a", None), prompt("3", "a"), prompt("4", "b")]
    assert {k: [p.id for p in v] for k, v in by_domain(prompts, 1).items()} == {
        "a": ["3"],
        "b": ["1"],
    }


def test_replicas_share_the_prompts_and_add_up(tiny_world: World) -> None:
    tokenizer = ChatTokenizer.load(tiny_world.student)
    domains = {
        "a": [prompt("1-ab", "a"), prompt("2-x", "a"), prompt("3-ab", "a")],
        "b": [prompt("4-x", "b")],
    }

    def scores(rank: int, size: int, other: np.ndarray | None) -> tuple[Scores, np.ndarray]:
        local: list[np.ndarray] = []

        def add(values: np.ndarray) -> np.ndarray:
            local.append(values)
            return values if other is None else values + other

        found = student_scores(
            Scripted(tokenizer),
            domains,
            tokenizer=tokenizer,
            share=(rank, size),
            sum_over_replicas=add,
            finished=lambda: progress.append(len(local)),
        )
        return found, local[0]

    progress: list[int] = []
    alone, _ = scores(0, 1, None)
    assert progress == [0, 0], "told after every domain, before the replicas meet"
    assert alone["a"] == {"accuracy": pytest.approx(2 / 3), "canonical": 1.0, "prompts": 3.0}
    assert alone["b"]["accuracy"] == 0.0
    _, first = scores(0, 2, np.array([0.0, 0, 1, 0, 0, 1]))
    both, _ = scores(1, 2, first)
    assert both == alone


def test_the_best_teacher_of_a_domain_counts(tiny_world: World) -> None:
    tokenizer = ChatTokenizer.load(tiny_world.student)
    asked = {"a": [Prompt(id="1", messages=(), domain="a", answer="x", teachers=("u", "v"))]}
    pool = {"u": Fixed(0.4, tokenizer), "v": Fixed(0.7, tokenizer), "w": Fixed(1.0, tokenizer)}
    progress: list[None] = []
    found = teacher_scores(pool, asked, max_new_tokens=1, finished=lambda: progress.append(None))
    assert found == {"a": 0.7} and len(progress) == 1
    assert teacher_scores(
        {"u": Fixed(None, tokenizer), "v": Fixed(None, tokenizer)}, asked, max_new_tokens=1
    ) == {"a": None}


def accuracies(*values: float, prompts: int = 100) -> Scores:
    return {
        f"d{n}": {"accuracy": value, "canonical": 0.5, "prompts": float(prompts)}
        for n, value in enumerate(values)
    }


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((0.2,), (0.2,), False),
        ((0.0,), (0.0,), False),
        ((0.5,), (0.64,), True),  # standard error 0.0693
        ((0.5,), (0.63,), False),
        ((0.5, 0.5), (0.6, 0.6), True),  # two domains halve the variance: 0.0495
        ((0.5, 0.5), (0.9, 0.1), False),
        ((0.9,), (0.1,), False),
    ],
)
def test_learned_means_two_standard_errors(
    before: tuple[float, ...], after: tuple[float, ...], expected: bool
) -> None:
    assert has_learned(accuracies(*before), accuracies(*after)) is expected


def test_results_keep_the_two_sides_apart() -> None:
    found = results(accuracies(0.2), accuracies(0.6), {"d0": 1.0})["d0"]
    assert (found.before, found.after, found.teacher) == (0.2, 0.6, 1.0)
    assert found.headroom_recovered == pytest.approx(0.5)
    assert results(accuracies(0.2), accuracies(0.6), {})["d0"].teacher is None
