"""What stands for the several teacher rows of one chunk, and lists of entries in general.

Only the boundary row is about the same event as the student's (docs/losses.md); the other merges
are those of published systems: TRL (``mean_prob``, ``observed``, ``bayesian``) and NeMo-RL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mopd.align.temper import Tempered
from mopd.types import TeacherScores, ragged_arange

Merge = Literal["boundary", "mean_prob", "nemo", "observed", "bayesian", "decayed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """Rows of teacher tokens; ``ids`` None is the whole vocabulary, [K] the same for all rows."""

    ids: np.ndarray | None  # [R, K] int32, -1 where padded
    logprobs: np.ndarray  # [R, K] float32
    log_tail: np.ndarray  # [R] float32


def merged_rows(
    scores: TeacherScores, tempered: Tempered, *, row: np.ndarray, count: np.ndarray, merge: Merge
) -> Lists:
    """One list per chunk of the teacher rows ``row : row + count``.

    boundary: the first row. mean_prob: the mean of the probabilities. nemo: the geometric mean, not
    normalised; a token that one of the rows does not list has probability 0, and the tail is the
    geometric mean of the tails. observed: the first row times the probabilities of the later actual
    tokens. bayesian: the last row times those of the earlier ones. The means list the K largest
    entries of all rows; the others join the tail.
    """
    if merge in ("mean_prob", "nemo"):
        return _means(scores, tempered, row=row, count=count, geometric=merge == "nemo")
    source, factor = row, np.zeros(len(row))
    if merge != "boundary":
        of = np.repeat(np.arange(len(row)), count)
        token = ragged_arange(row, count)
        source = row if merge == "observed" else row + count - 1
        others = np.where(token == source[of], 0.0, tempered.actual[token])
        factor = np.bincount(of, weights=others, minlength=len(row))
    factor = factor.astype(np.float32)
    return Lists(
        ids=None if scores.topk_ids is None else scores.topk_ids[source],
        logprobs=tempered.rows(source) + factor[:, None] if factor.any() else tempered.rows(source),
        log_tail=tempered.log_tail[source] + factor,
    )


def _means(
    scores: TeacherScores,
    tempered: Tempered,
    *,
    row: np.ndarray,
    count: np.ndarray,
    geometric: bool,
) -> Lists:
    lists = merged_rows(scores, tempered, row=row, count=count, merge="boundary")
    several = np.flatnonzero(count > 1)
    if not len(several):
        return lists
    many = count[several]
    if scores.topk_ids is None:
        for chunk, begin, size in zip(several, row[several], many, strict=True):
            rows = tempered.rows(np.arange(begin, begin + size)).astype(np.float64)
            with np.errstate(divide="ignore"):
                mean = rows.mean(axis=0) if geometric else np.log(np.exp(rows).mean(axis=0))
            lists.logprobs[chunk] = mean
        return lists
    of = np.repeat(np.arange(len(several)), many)
    token = ragged_arange(row[several], many)
    tails = tempered.log_tail[token].astype(np.float64)
    weights = (tails if geometric else np.exp(tails)) / many[of]
    tail = np.bincount(of, weights=weights, minlength=len(several))
    entry, column = np.nonzero(scores.topk_ids[token] >= 0)
    logs = tempered.at(token[entry], column).astype(np.float64)
    owner, ids, seen, summed = sum_entries(
        of[entry], scores.topk_ids[token[entry], column], logs if geometric else np.exp(logs)
    )
    mass = summed / many[owner]
    if geometric:
        tail, mass = np.exp(tail), np.where(seen == many[owner], np.exp(mass), 0.0)
    width = scores.topk_ids.shape[1]
    cut = largest_entries(owner, ids, mass, num_rows=len(several), width=width)
    assert lists.ids is not None
    lists.ids[several], lists.logprobs[several] = cut.ids, cut.logprobs
    with np.errstate(divide="ignore"):
        lists.log_tail[several] = np.log(tail + np.exp(cut.log_tail.astype(np.float64)))
    return lists


def sum_entries(
    row: np.ndarray, token: np.ndarray, value: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Entries summed by (row, token): (row, token, how many, sum), ascending."""
    span = int(token.max(initial=0)) + 1
    key = row.astype(np.int64) * span + token
    order = np.argsort(key, kind="stable")
    key = key[order]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    summed = np.add.reduceat(value[order], first) if len(first) else np.zeros(0)
    return key[first] // span, key[first] % span, np.diff(first, append=len(key)), summed


def largest_entries(
    row: np.ndarray, token: np.ndarray, mass: np.ndarray, *, num_rows: int, width: int | None
) -> Lists:
    """Lists of the ``width`` largest entries of each row; the rest of the mass is the tail.

    Entries come in order of row and token; ties go to the smaller token. ``width`` None keeps all.
    """
    tail = np.zeros(num_rows)
    listed = mass > 0
    if width is not None:
        listed &= _may_be_listed(row, mass, num_rows=num_rows, width=width)
        tail += np.bincount(row[~listed], weights=mass[~listed], minlength=num_rows)
    row, token, mass = row[listed], token[listed], mass[listed]
    order = np.lexsort((-mass, row))
    row, token, mass = row[order], token[order], mass[order]
    counts = np.bincount(row, minlength=num_rows)
    rank = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
    width = int(counts.max(initial=0)) if width is None else width
    ids = np.full((num_rows, width), -1, dtype=np.int32)
    logprobs = np.full((num_rows, width), -np.inf, dtype=np.float32)
    inside = rank < width
    ids[row[inside], rank[inside]] = token[inside]
    logprobs[row[inside], rank[inside]] = np.log(mass[inside])
    tail += np.bincount(row[~inside], weights=mass[~inside], minlength=num_rows)
    with np.errstate(divide="ignore"):
        return Lists(ids=ids, logprobs=logprobs, log_tail=np.log(tail).astype(np.float32))


def _may_be_listed(row: np.ndarray, mass: np.ndarray, *, num_rows: int, width: int) -> np.ndarray:
    """Whether an entry is among the ``width`` largest of its row, in float32: equal ones all are.

    Sorting plain integers and comparing is far faster than ordering all entries by two keys; what
    is left to order is short.
    """
    counts = np.bincount(row, minlength=num_rows)
    # the bits of positive floats have the order of the floats
    small = np.int64(2**31 - 1) - mass.astype(np.float32).view(np.int32)
    key = (row.astype(np.int64) << 32) | small
    last = np.cumsum(counts) - counts + np.minimum(counts, width) - 1
    if not len(key) or width == 0:
        return np.zeros(len(key), dtype=bool)
    threshold = np.sort(key)[np.maximum(last, 0)]
    return key <= threshold[row]


def stacked(parts: Sequence[Lists], *, width: int) -> Lists:
    """Lists of ``width`` entries, one after the other."""
    none = largest_entries(np.zeros(0, int), np.zeros(0, int), np.zeros(0), num_rows=0, width=width)
    parts = [none, *parts]
    ids = [part.ids for part in parts if part.ids is not None]
    return Lists(
        ids=np.concatenate(ids),
        logprobs=np.concatenate([part.logprobs for part in parts]),
        log_tail=np.concatenate([part.log_tail for part in parts]),
    )


def native_rows(position: np.ndarray, lists: Lists) -> dict[str, np.ndarray]:
    """The native fields of `TeacherRows`, each row of weight 1."""
    assert lists.ids is not None
    return {
        "native_position": position.astype(np.int64),
        "native_weight": np.ones(len(position), dtype=np.float32),
        "native_ids": lists.ids,
        "native_logprobs": lists.logprobs,
        "native_log_tail": lists.log_tail,
    }


def join_native(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Native fields of several kinds in one ascending order; narrower lists are padded."""
    width = max(part["native_ids"].shape[1] for part in parts)
    order = np.argsort(np.concatenate([part["native_position"] for part in parts]), kind="stable")

    def joined(name: str) -> np.ndarray:
        arrays = [part[name] for part in parts]
        if arrays[0].ndim == 2:
            fill = -1 if name == "native_ids" else -np.inf
            arrays = [
                np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=fill) for a in arrays
            ]
        return np.concatenate(arrays)[order]

    return {name: joined(name) for name in parts[0]}
