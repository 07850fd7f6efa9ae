"""Aligned answers -> one replica's share of a step, with the weights and sums of the whole step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mopd.align.batch import Batching, Sample, make_micro_batches
from mopd.align.select import Score
from mopd.runtime.weights import (
    Normalizer,
    Shares,
    dynamic_weights,
    score_sums,
    stand_ins,
)
from mopd.types import StepBatch, TeacherScores


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """How a step weighs teachers, domains and rows.

    ``score`` None keeps the static weights; ``selection`` None lets every teacher count that
    judges an answer, else chunk by chunk by ``selection_score``.
    """

    weights: Mapping[str, float]  # the recipe's, normalised to 1
    normalizer: Normalizer
    score: Score | None = None
    selection: Literal["best", "weighted"] | None = None
    selection_score: Score = "nll"
    sharpness: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over all replicas: what every one of them must agree on."""

    shares: Shares
    scores: Mapping[str, tuple[float, float]]
    num_tokens: int
    num_response_tokens: int
    masked_share: float


def collate(
    step: int,
    samples: Sequence[Sample],
    *,
    scores: Sequence[Mapping[str, TeacherScores]],
    masked: tuple[float, float],
    objective: Objective,
    batching: Batching,
    pad_id: int,
    sum_over_replicas: Callable[[np.ndarray], np.ndarray],
) -> tuple[StepBatch, Totals]:
    """The batch (without metrics) and the sums behind it. ``masked``: (unjudged tokens, tokens)."""
    normalizer = objective.normalizer
    weighed = normalizer.sequence_weights(samples)
    local = _local_sums(weighed, scores, masked=masked, objective=objective)
    totals = _read(sum_over_replicas(local), objective)
    weighed = normalizer.domain_weights(weighed, totals.shares)
    weights = {}
    if objective.score is not None:
        weights = dynamic_weights(objective.weights, totals.scores, objective.sharpness)
    selected = objective.selection is not None
    weighed = [stand_ins(s, weights or objective.weights, selected=selected) for s in weighed]
    micro_batches = make_micro_batches(weighed, batching=batching, pad_id=pad_id)
    batch = StepBatch(
        step=step,
        micro_batches=micro_batches,
        denominators=normalizer.denominators(totals.shares),
        num_tokens=totals.num_tokens,
        metrics={},
        weights=weights,
        num_response_tokens=totals.num_response_tokens,
    )
    return batch, totals


def _local_sums(
    samples: Sequence[Sample],
    scores: Sequence[Mapping[str, TeacherScores]],
    *,
    masked: tuple[float, float],
    objective: Objective,
) -> np.ndarray:
    shares = objective.normalizer.shares(samples)
    tokens = sum(len(s.rollout.prompt_ids) + len(s.rollout.token_ids) for s in samples)
    trained = sum(int(s.loss_mask.sum()) for s in samples)
    sums = np.zeros((len(objective.weights), 2))
    if objective.score is not None:
        for per_teacher in scores:
            for place, name in enumerate(objective.weights):
                if name in per_teacher:
                    sums[place] += score_sums(per_teacher[name], objective.score)
    rest = np.array([tokens, trained, *masked], dtype=np.float64)
    return np.concatenate([shares.mass.ravel(), shares.samples.ravel(), sums.ravel(), rest])


def _read(total: np.ndarray, objective: Objective) -> Totals:
    normalizer = objective.normalizer
    shape = (len(normalizer.teachers), len(normalizer.domains))
    size, names = shape[0] * shape[1], list(objective.weights)
    sums = total[2 * size : 2 * size + 2 * len(names)].reshape(-1, 2)
    tokens, trained, unjudged, judged = total[-4:].tolist()
    return Totals(
        shares=Shares(
            mass=total[:size].reshape(shape), samples=total[size : 2 * size].reshape(shape)
        ),
        scores={name: (float(a), float(b)) for name, (a, b) in zip(names, sums, strict=True)},
        num_tokens=int(tokens),
        num_response_tokens=int(trained),
        masked_share=unjudged / max(judged, 1.0),
    )
