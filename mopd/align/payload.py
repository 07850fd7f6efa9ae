"""Teacher rows on the student's prediction axis: boundary rows, chunk sums and path targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from mopd.align.boundaries import payload_index
from mopd.align.fold import ColumnMap, column_map, fold_rows, keep_columns
from mopd.align.interior import Interior, interior_rows
from mopd.align.merge import Lists, Merge, join_native, merged_rows
from mopd.align.paths import PathOptions, path_targets
from mopd.align.pull import Pieces, pulled_rows
from mopd.align.temper import Tempered, temper
from mopd.types import Alignment, TeacherRows, TeacherScores, no_native_rows


@dataclass(frozen=True, kw_only=True)
class PayloadOptions:
    """What a teacher's rows carry.

    Args:
        fold: [V_T] int32 moves teacher mass to the column that stands for it; None leaves it.
        path: None switches path terms off.
        columns: [K] teacher tokens, ascending: the only ones kept; the rest is the tail.
        merge: what stands for the teacher's rows of a chunk (`mopd.align.merge`).
        direction: "pull" carries the teacher over to the student's tokens (`mopd.align.pull`);
            the rows are native ones then, and no boundary row lists anything. So it is with
            ``merge`` "decayed".
        pieces: how the teacher spells the student's tokens; for both.
        interior: rows over the student's own tokens inside chunks.
        renormalize: mass that folds to null is dropped, the rest divided by what is left, instead
            of joining the tail.

    Raises:
        ValueError: a pull without pieces, or of merged rows.
    """

    temperature: float
    fold: np.ndarray | None = None
    path: PathOptions | None = None
    columns: np.ndarray | None = None
    merge: Merge = "boundary"
    direction: Literal["push", "pull"] = "push"
    pieces: Pieces | None = None
    interior: Interior | None = None
    renormalize: bool = False

    def __post_init__(self) -> None:
        if self.direction == "pull" and self.merge != "boundary":
            raise ValueError(f"direction pull reads the boundary row, not merge {self.merge}")
        if self.native_only and self.pieces is None:
            raise ValueError("a pull needs the teacher's pieces of the student's tokens")

    @property
    def native_only(self) -> bool:
        """Whether all that is asked is asked of the student's own tokens."""
        return self.direction == "pull" or self.merge == "decayed"

    @cached_property
    def folds(self) -> bool:
        """Whether any token moves."""
        return self.fold is not None and bool((self.fold != np.arange(len(self.fold))).any())

    @cached_property
    def _folded_columns(self) -> ColumnMap:
        assert self.fold is not None
        return column_map(len(self.fold), fold=self.fold, columns=self.columns)

    def column_map(self, size: int) -> ColumnMap:
        """Where the columns of rows over ``size`` teacher tokens go."""
        if self.fold is None:
            return column_map(size, fold=None, columns=self.columns)
        return self._folded_columns


def teacher_rows(
    scores: TeacherScores,
    alignment: Alignment,
    *,
    student_ids: np.ndarray,
    trainable: np.ndarray,
    options: PayloadOptions,
    sampling_logprobs: np.ndarray | None = None,
    canonical_ids: np.ndarray | None = None,
    report: dict[str, tuple[float, float]] | None = None,
) -> TeacherRows:
    """One rollout's rows; positions count response tokens (0 predicts the first one).

    Args:
        student_ids: [S] the sampled response; trainable: [S] bool, its loss mask.
        sampling_logprobs: [S] the sampler's; None where no loss asks for them.
        canonical_ids: [S] of `mopd.align.canonical`, for path terms that ask for it.
        report: takes (sum, count) of `interior_coverage`, the share that interior rows speak for,
            and `unreachable_mass`, what folds to null, where they arise.
    A chunk is dropped when one of its student tokens is not trainable or a teacher row is missing.
    """
    kept = kept_chunks(scores, alignment, trainable)
    index = payload_index(alignment, kept=kept)
    sizes, row, position = index.size, index.row, index.position
    chunk_logprob = _chunk_sums(scores.logprobs, alignment.teacher_starts)
    tempered = temper(scores, options.temperature)
    lists, lost = _lists(scores, tempered, row=row, count=sizes[:, 1], options=options)
    if options.renormalize:
        lists = _without_lost(lists, lost)
    if report is not None and options.fold is not None:
        report["unreachable_mass"] = (float(lost.sum()), float(len(lost)))
    native = [no_native_rows()]
    if options.native_only:
        native.append(_pulled(scores, tempered, position=position, row=row, options=options))
    if options.interior is not None:
        found, covered = interior_rows(
            scores,
            tempered,
            position=position,
            row=row,
            sizes=sizes,
            student_ids=student_ids,
            trainable=trainable,
            interior=options.interior,
        )
        native.append(found)
        if report is not None:
            report["interior_coverage"] = (float(covered.sum()), float(len(covered)))
    return TeacherRows(
        teacher=scores.teacher,
        position=position,
        row_weight=np.ones(len(position), dtype=np.float32),
        topk_ids=lists.ids,
        topk_logprobs=lists.logprobs,
        log_tail=lists.log_tail,
        chunk_logprob=chunk_logprob[kept].astype(np.float32),
        chunk_size=sizes.astype(np.int32),
        chunk_weight=np.ones(len(position), dtype=np.float32),
        chunk_owned=np.ones(len(position), dtype=bool),
        chunk_sequence=np.zeros(len(position), dtype=np.int64),
        token_position=index.token_position,
        token_id=student_ids[index.token_position].astype(np.int64),
        token_chunk=index.token_chunk,
        token_sampling_logprob=_sampled(sampling_logprobs, index.token_position),
        **join_native(native),
        **path_targets(
            scores,
            tempered,
            position=position,
            row=row,
            options=options.path,
            canonical_ids=canonical_ids,
        ),
    )


def _pulled(
    scores: TeacherScores,
    tempered: Tempered,
    *,
    position: np.ndarray,
    row: np.ndarray,
    options: PayloadOptions,
) -> dict[str, np.ndarray]:
    assert options.pieces is not None
    return pulled_rows(
        scores,
        tempered,
        position=position,
        row=row,
        pieces=options.pieces,
        decayed=options.merge == "decayed",
    )


def kept_chunks(scores: TeacherScores, alignment: Alignment, trainable: np.ndarray) -> np.ndarray:
    """[C] bool: every student token is trainable and no teacher row is missing."""
    missing = _chunk_sums((~scores.valid).astype(np.float64), alignment.teacher_starts)
    untrained = _chunk_sums((~trainable).astype(np.float64), alignment.student_starts)
    return (untrained == 0) & (missing == 0)


def _lists(
    scores: TeacherScores,
    tempered: Tempered,
    *,
    row: np.ndarray,
    count: np.ndarray,
    options: PayloadOptions,
) -> tuple[Lists, np.ndarray]:
    """The boundary rows, merged first, then cut to the columns, then folded; and the mass [R] that
    folded to null, which is in the tail."""
    nothing = np.zeros(len(row))
    if options.native_only:
        none = np.zeros((len(row), 0))
        tail = np.zeros(len(row), dtype=np.float32)
        empty = Lists(ids=none.astype(np.int32), logprobs=none.astype(np.float32), log_tail=tail)
        return empty, nothing
    cut = options.columns is not None or options.folds
    if scores.topk_ids is None and options.merge == "boundary" and not cut:
        whole = Lists(ids=None, logprobs=scores.topk_logprobs[row], log_tail=scores.log_tail[row])
        return whole, nothing
    lists = merged_rows(scores, tempered, row=row, count=count, merge=options.merge)
    if lists.ids is None:
        size = lists.logprobs.shape[1]
        if not cut:  # merged rows need not sum to 1, so they may not stand for a softmax
            return replace(lists, ids=np.arange(size, dtype=np.int32)), nothing
        columns = options.column_map(size)
        lost = _null_mass(columns.lost[None, :], lists.logprobs, columns.lost)
        logprobs, log_tail = columns.apply(lists.logprobs)
        return Lists(ids=columns.ids, logprobs=logprobs, log_tail=log_tail), lost
    ids, logprobs, log_tail = lists.ids, lists.logprobs, lists.log_tail
    if options.columns is not None:
        ids, logprobs, log_tail = keep_columns(ids, logprobs, log_tail, options.columns)
    if options.fold is None:
        return Lists(ids=ids, logprobs=logprobs, log_tail=log_tail), nothing
    null = np.append(options.fold == len(options.fold), False)  # padding, -1, is the last entry
    lost = _null_mass(null[ids], logprobs, null)
    ids, logprobs, log_tail = fold_rows(ids, logprobs, log_tail, options.fold)
    return Lists(ids=ids, logprobs=logprobs, log_tail=log_tail), lost


def _null_mass(lost: np.ndarray, logprobs: np.ndarray, anything: np.ndarray) -> np.ndarray:
    """[R] float64: the probability of the entries that are ``lost``."""
    if not anything.any():
        return np.zeros(len(logprobs))
    return np.where(lost, np.exp(logprobs.astype(np.float64)), 0.0).sum(axis=1)


def _without_lost(lists: Lists, lost: np.ndarray) -> Lists:
    """The lists as if the mass ``lost`` [R], now in the tail, had never been there."""
    if not lost.any():
        return lists
    tail = np.exp(lists.log_tail.astype(np.float64))
    total = np.exp(lists.logprobs.astype(np.float64)).sum(axis=1) + tail
    with np.errstate(divide="ignore"):
        left = np.log(np.maximum(1.0 - lost / total, 1e-30))
        log_tail = np.log(np.maximum(tail - lost, 0.0)) - left
    logprobs = (lists.logprobs - left[:, None]).astype(np.float32)
    return replace(lists, logprobs=logprobs, log_tail=log_tail.astype(np.float32))


def column_peaks(scores: Sequence[TeacherScores], size: int) -> np.ndarray:
    """[size] float32: the highest log-probability of each teacher token over all rows, -inf where
    no row lists it."""
    best = np.full(size, -np.inf, dtype=np.float32)
    for each in scores:
        rows = each.topk_logprobs[each.valid]
        if each.topk_ids is None:
            if len(rows):
                top = temper(each, 1.0).rows(np.flatnonzero(each.valid)).max(axis=0)
                np.maximum(best, top, out=best)
        else:
            listed = each.topk_ids[each.valid] >= 0
            np.maximum.at(best, each.topk_ids[each.valid][listed], rows[listed])
    return best


def shared_columns(peaks: np.ndarray, k: int) -> np.ndarray:
    """[k] int32, ascending: the columns with the highest of `column_peaks`; fewer if fewer were
    listed. Ties go to the smaller id."""
    order = np.argsort(-peaks, kind="stable")[:k]
    return np.sort(order[np.isfinite(peaks[order])]).astype(np.int32)


def _sampled(logprobs: np.ndarray | None, position: np.ndarray) -> np.ndarray:
    if logprobs is None:
        return np.zeros(len(position), dtype=np.float32)
    return logprobs[position].astype(np.float32)


def _chunk_sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """[C] float64 sums; what one chunk holds (a NaN, -inf) does not reach the next."""
    if len(starts) < 2:
        return np.zeros(0)
    return np.add.reduceat(values[: starts[-1]].astype(np.float64), starts[:-1])
