"""Several teachers on one sample: whose rows count where.

Teachers cut the same text into different chunks, so they are compared on the student's axis: a
teacher's score at a student token is that of its chunk there. Scores come from the payload alone,
so that every rank of a replica selects alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from mopd.align.temper import row_blocks, temper
from mopd.types import Alignment, TeacherRows, TeacherScores

_IMPOSSIBLE = -1e30

Score = Literal["nll", "entropy", "confidence"]


def byte_scores(scores: TeacherScores, alignment: Alignment, kind: Score) -> np.ndarray:
    """[S'] float64: per student token up to the last chunk, its chunk's score; high is good.

    nll: log-probability of the chunk per byte, which does not depend on how the teacher cuts it.
    entropy: minus the mean entropy of its rows, the tail as one bin. confidence: the mean of their
    largest listed probability. A chunk with a missing teacher row is NaN, and so are tokens before
    the first chunk. The end of the turn has
    no bytes and counts as one.
    """
    starts = alignment.teacher_starts
    if alignment.num_chunks == 0:
        return np.zeros(0)
    ends = np.concatenate([[0], scores.byte_ends])[starts]
    if kind == "nll":
        row_score, divisor = scores.logprobs.astype(np.float64), np.maximum(np.diff(ends), 1)
    else:
        row_score, divisor = row_scores(scores, kind), np.diff(starts)
    row_score = np.where(scores.valid, row_score, np.nan)[: starts[-1]]
    of_chunk = np.add.reduceat(row_score, starts[:-1]) / divisor
    before = np.full(int(alignment.student_starts[0]), np.nan)
    return np.concatenate([before, np.repeat(of_chunk, np.diff(alignment.student_starts))])


def row_scores(scores: TeacherScores, kind: Score) -> np.ndarray:
    """[T] float64, entropy or confidence of each row's listed and tail probabilities."""
    tempered = temper(scores, 1.0)
    found = np.zeros(len(scores.token_ids))
    for part in row_blocks(len(found), scores.topk_logprobs.shape[1]):
        logs = tempered.rows(np.arange(part.start, part.stop)).astype(np.float64)
        if kind == "confidence":
            found[part] = np.exp(logs.max(axis=1, initial=-np.inf))
            continue
        logs = np.concatenate([logs, scores.log_tail[part, None]], axis=1)
        # p log p is 0 where p is 0
        found[part] = (np.exp(logs) * np.where(np.isneginf(logs), 0.0, logs)).sum(axis=1)
    return found


def select(
    rows: Mapping[str, TeacherRows],
    scores: Mapping[str, np.ndarray],
    *,
    mode: Literal["best", "weighted"],
    sharpness: float = 1.0,
) -> dict[str, TeacherRows]:
    """One sample's rows with new weights: teachers share each student token that they cover.

    Args:
        rows: positions count response tokens, as `teacher_rows` gives them.
        scores: per teacher, a score per student token (`byte_scores`).
        mode: "best" gives a token to the highest score, the first of equal ones; "weighted" gives
            softmax(sharpness * score).
    A place that is no boundary of one teacher does not add to the weight of another: each share is
    that of the student token, whether or not the teacher has a row there.
    """
    names = list(rows)
    size = 1 + max((int(r.token_position.max(initial=-1)) for r in rows.values()), default=-1)
    table = np.full((len(names), size), -np.inf)
    for number, name in enumerate(names):
        covered = rows[name].token_position
        # a covered token stays apart from an uncovered one where its probability is 0
        table[number, covered] = np.maximum(scores[name][covered], _IMPOSSIBLE)
    share = _shares(table, mode=mode, sharpness=sharpness)
    return {name: _weighted(rows[name], share[number]) for number, name in enumerate(names)}


def _shares(table: np.ndarray, *, mode: str, sharpness: float) -> np.ndarray:
    """[teachers, S] weights that sum to 1 where any teacher covers the token, else 0."""
    if not table.size:
        return np.zeros(table.shape)
    top = table.max(axis=0)
    if mode == "best":
        first = np.argmax(table, axis=0)
        return ((np.arange(len(table))[:, None] == first) & np.isfinite(top)).astype(np.float64)
    mass = np.exp(sharpness * (table - np.where(np.isfinite(top), top, 0.0)))
    return mass / np.maximum(mass.sum(axis=0), 1e-300)


def _weighted(rows: TeacherRows, share: np.ndarray) -> TeacherRows:
    def times(weight: np.ndarray, position: np.ndarray) -> np.ndarray:
        return (weight * share[position]).astype(weight.dtype)

    return replace(
        rows,
        row_weight=times(rows.row_weight, rows.position),
        chunk_weight=times(rows.chunk_weight, rows.position),
        path_weight=times(rows.path_weight, rows.path_position),
        native_weight=times(rows.native_weight, rows.native_position),
    )
