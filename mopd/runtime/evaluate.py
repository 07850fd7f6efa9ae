"""Greedy accuracy on held-out prompts, and the verdict on a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Protocol

import numpy as np

from mopd.metrics.summary import DomainResult
from mopd.rollout.base import is_canonical
from mopd.teachers.base import Teacher
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout

Scores = dict[str, dict[str, float]]  # domain -> {"accuracy", "canonical", "prompts"}


class Answerer(Protocol):
    """What an evaluation needs of a sampler."""

    def answer(self, prompts: Sequence[Prompt]) -> list[Rollout]: ...


def by_domain(prompts: Sequence[Prompt], limit: int) -> dict[str, list[Prompt]]:
    """The first ``limit`` checkable prompts of each domain."""
    domains: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        if prompt.answer is not None:
            domains.setdefault(prompt.domain, []).append(prompt)
    return {name: domains[name][:limit] for name in sorted(domains)}


def batches_of(prompts: Sequence[Prompt], *, per_domain: int, size: int) -> list[list[Prompt]]:
    """The first ``per_domain`` prompts of each domain, checkable or not, in batches of ``size``.

    Domains take turns, so that batches have about equal shares of them.
    """
    domains: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        domains.setdefault(prompt.domain, []).append(prompt)
    rounds = zip_longest(*(domains[name][:per_domain] for name in sorted(domains)))
    mixed = [prompt for turn in rounds for prompt in turn if prompt is not None]
    return [mixed[i : i + size] for i in range(0, len(mixed), size)]


def student_scores(
    sampler: Answerer,
    domains: Mapping[str, Sequence[Prompt]],
    *,
    tokenizer: ChatTokenizer,
    share: tuple[int, int],
    sum_over_replicas: Callable[[np.ndarray], np.ndarray],
    finished: Callable[[], None] = lambda: None,
) -> Scores:
    """Exact match and canonical share per domain; each replica answers every ``size``-th prompt.

    ``finished`` is called after every domain.
    """
    rank, size = share
    totals = np.zeros((len(domains), 3))
    for row, prompts in enumerate(domains.values()):
        mine = list(prompts)[rank::size]
        answers = sampler.answer(mine) if mine else []
        totals[row] = (
            sum(answer.reward or 0.0 for answer in answers),
            sum(is_canonical(answer, tokenizer) for answer in answers),
            len(answers),
        )
        finished()
    totals = sum_over_replicas(totals.reshape(-1)).reshape(-1, 3)
    return {
        name: {
            "accuracy": float(right / count),
            "canonical": float(canonical / count),
            "prompts": float(count),
        }
        for name, (right, canonical, count) in zip(domains, totals, strict=True)
    }


def teacher_scores(
    teachers: Mapping[str, Teacher],
    domains: Mapping[str, Sequence[Prompt]],
    *,
    max_new_tokens: int,
    finished: Callable[[], None] = lambda: None,
) -> dict[str, float | None]:
    """Accuracy of the best teacher of each domain, on the same prompts and in its own tokens.

    ``finished`` is called after every domain.
    """
    best: dict[str, float | None] = {}
    for domain, prompts in domains.items():
        names = prompts[0].teachers
        found = [teachers[name].accuracy(prompts, max_new_tokens=max_new_tokens) for name in names]
        known = [accuracy for accuracy in found if accuracy is not None]
        best[domain] = max(known) if known else None
        finished()
    return best


def results(
    before: Scores, after: Scores, teachers: Mapping[str, float | None]
) -> dict[str, DomainResult]:
    """Per domain: before, after, teacher, headroom and canonical shares."""
    return {
        domain: DomainResult(
            before=before[domain]["accuracy"],
            after=after[domain]["accuracy"],
            teacher=teachers.get(domain),
            canonical_before=before[domain]["canonical"],
            canonical_after=after[domain]["canonical"],
        )
        for domain in after
    }


def has_learned(before: Scores, after: Scores) -> bool:
    """Whether mean accuracy rose by more than two standard errors of the difference."""
    gain = np.mean([after[d]["accuracy"] - before[d]["accuracy"] for d in after])
    variance = sum(
        s[d]["accuracy"] * (1 - s[d]["accuracy"]) / s[d]["prompts"]
        for s in (before, after)
        for d in after
    )
    return bool(gain > 2.0 * math.sqrt(variance) / len(after))
