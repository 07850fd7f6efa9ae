"""Teacher rows on the student's prediction axis: boundary rows, chunk sums and path targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mopd.align.boundaries import chunk_sizes
from mopd.align.paths import PathOptions, Tempered, path_targets
from mopd.types import Alignment, TeacherRows, TeacherScores, no_native_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadOptions:
    """``fold`` [V_T] int32 moves teacher mass to the column that stands for it; None leaves it.

    ``path`` None switches path terms off.
    """

    temperature: float
    fold: np.ndarray | None = None
    path: PathOptions | None = None


def temper(scores: TeacherScores, temperature: float) -> Tempered:
    """The teacher's log-probabilities at the loss's temperature.

    Raises:
        ValueError: the temperature is not 1 and the teacher sent no log-sum-exps.
    """
    if temperature == 1.0:
        return Tempered(topk=scores.topk_logprobs, log_tail=scores.log_tail, actual=scores.logprobs)
    if scores.lse is None:
        raise ValueError(f"teacher {scores.teacher} sends no log-sum-exp; set temperature to 1")
    lse = scores.lse.astype(np.float64)
    topk = (scores.topk_logprobs + lse[:, :1]) / temperature - lse[:, 1:]
    actual = (scores.logprobs + lse[:, 0]) / temperature - lse[:, 1]
    with np.errstate(divide="ignore"):
        inside = np.minimum(np.log(np.exp(topk).sum(axis=1)), -1e-7)
        tail = np.where(np.isneginf(scores.log_tail), -np.inf, np.log(-np.expm1(inside)))
    return Tempered(
        topk=topk.astype(np.float32),
        log_tail=tail.astype(np.float32),
        actual=actual.astype(np.float32),
    )


def fold_rows(
    ids: np.ndarray, logprobs: np.ndarray, log_tail: np.ndarray, fold: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Moves each id to ``fold[id]``, adds up what meets, and what folds to null joins the tail."""
    null = len(fold)
    target = np.where(ids >= 0, fold[np.clip(ids, 0, null - 1)], null)
    order = np.argsort(target, axis=1, kind="stable")
    target = np.take_along_axis(target, order, axis=1)
    mass = np.take_along_axis(np.exp(logprobs.astype(np.float64)), order, axis=1)
    mass = np.where(np.take_along_axis(ids >= 0, order, axis=1), mass, 0.0)
    first = np.ones(target.shape, dtype=bool)
    first[:, 1:] = target[:, 1:] != target[:, :-1]
    group = np.cumsum(first, axis=1) - 1
    summed = np.zeros_like(mass)
    rows = np.broadcast_to(np.arange(len(ids))[:, None], group.shape)
    np.add.at(summed, (rows, group), mass)
    leader = np.full(target.shape, null)
    np.put_along_axis(leader, group, target, axis=1)
    is_null = leader >= null
    tail = np.exp(log_tail.astype(np.float64)) + np.where(is_null, summed, 0.0).sum(axis=1)
    with np.errstate(divide="ignore"):
        out = np.log(np.where(is_null, 0.0, summed)).astype(np.float32)
        return np.where(is_null, -1, leader).astype(np.int32), out, np.log(tail).astype(np.float32)


def teacher_rows(
    scores: TeacherScores,
    alignment: Alignment,
    *,
    student_ids: np.ndarray,
    trainable: np.ndarray,
    options: PayloadOptions,
    sampling_logprobs: np.ndarray | None = None,
) -> TeacherRows:
    """One rollout's rows; positions count response tokens (0 predicts the first one).

    Args:
        student_ids: [S] the sampled response; trainable: [S] bool, its loss mask.
        sampling_logprobs: [S] the sampler's; None where no loss asks for them.
    A chunk is dropped when its first student token is not trainable or a teacher row is missing.
    """
    a, b = alignment.student_starts, alignment.teacher_starts
    missing = _chunk_sums((~scores.valid).astype(np.float64), b)
    kept = trainable[a[:-1]] & (missing == 0)
    sizes = chunk_sizes(alignment)[kept]
    tempered = temper(scores, options.temperature)
    row, position = b[:-1][kept], a[:-1][kept]
    assert scores.topk_ids is not None
    ids, logprobs, log_tail = scores.topk_ids[row], tempered.topk[row], tempered.log_tail[row]
    if options.fold is not None:
        ids, logprobs, log_tail = fold_rows(ids, logprobs, log_tail, options.fold)
    token_chunk = np.repeat(np.arange(len(position)), sizes[:, 0])
    first = np.cumsum(sizes[:, 0]) - sizes[:, 0]
    token_position = position[token_chunk] + np.arange(len(token_chunk)) - first[token_chunk]
    return TeacherRows(
        teacher=scores.teacher,
        position=position,
        row_weight=np.ones(len(position), dtype=np.float32),
        topk_ids=ids,
        topk_logprobs=logprobs,
        log_tail=log_tail,
        chunk_logprob=_chunk_sums(scores.logprobs, b)[kept].astype(np.float32),
        chunk_size=sizes.astype(np.int32),
        chunk_weight=np.ones(len(position), dtype=np.float32),
        chunk_owned=np.ones(len(position), dtype=bool),
        token_position=token_position,
        token_id=student_ids[token_position].astype(np.int64),
        token_chunk=token_chunk,
        token_sampling_logprob=_sampled(sampling_logprobs, token_position),
        **no_native_rows(),
        **path_targets(scores, tempered, position=position, row=row, options=options.path),
    )


def _sampled(logprobs: np.ndarray | None, position: np.ndarray) -> np.ndarray:
    if logprobs is None:
        return np.zeros(len(position), dtype=np.float32)
    return logprobs[position].astype(np.float32)


def _chunk_sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """[C] float64 sums; what one chunk holds (a NaN, -inf) does not reach the next."""
    if len(starts) < 2:
        return np.zeros(0)
    return np.add.reduceat(values[: starts[-1]].astype(np.float64), starts[:-1])
