"""CTKD with a teacher that is dense logits: its softmax and its choice of columns are work too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mopd.losses.base import Loss
from mopd.losses.vocab import VocabShard
from mopd.types import TeacherRows, TeacherScores
from tests.bench import formulas, problems, vocabularies
from tests.helpers.losses import build_loss

Sizes = tuple[int, int]  # student and teacher vocabulary
BLOCK = 8  # teacher rows at once


@dataclass(frozen=True, slots=True, kw_only=True)
class CtkdCase:
    """``rows`` does the teacher's part of the work; ``formula`` does all of it in plain torch."""

    problem: problems.CrossProblem
    rows: Callable[[], TeacherRows]
    loss: Loss
    formula: Callable[[Tensor], Tensor]
    what: str


def boundary(sizes: Sizes, rows: int, cache: Path) -> CtkdCase:
    """The recipes' default: top-64 and a tail, fold, path terms."""
    problem = problems.cross_problem(sizes, rows, cache)
    sample, logits = _teacher(sizes, rows, cache)
    options = problems.payload_options(problem.projection)
    token = torch.from_numpy(sample.scores.token_ids).long()

    def payload(*listed: Tensor) -> TeacherRows:
        ids, top, tail, actual = (part.numpy() for part in listed)
        scores = replace(
            sample.scores,
            topk_ids=ids.astype(np.int32),
            topk_logprobs=top,
            log_tail=tail,
            logprobs=actual,
        )
        return problems.aligned(replace(sample, scores=scores), options)[1]

    def formula(student: Tensor) -> Tensor:
        dense = logits.to(student.dtype)
        ids, top, tail = problems.top_k(dense, problems.TOP_K)
        actual = torch.log_softmax(dense, -1).gather(1, token[:, None])[:, 0]
        found = replace(problem, rows=payload(ids, top, tail, actual))
        return formulas.ctkd(
            student,
            problems.lists_of(found.rows, student.dtype),
            problems.paths_of(found, student.dtype),
            problems.sparse_weights(problem.projection, sizes[0], student.dtype),
        )

    paths = len(problem.rows.path_position)
    return CtkdCase(
        problem=problem,
        rows=lambda: payload(*top_lists(logits, token, problems.TOP_K)),
        loss=build_loss("ctkd", problem.shard, beta=0.0),
        formula=formula,
        what=f"{paths} path rows, dense teacher -> top-{problems.TOP_K} + tail, fold",
    )


def shared(sizes: Sizes, rows: int, cache: Path, *, columns: int | None) -> CtkdCase:
    """P-KL on the likeliest ``columns`` of all rows and a tail; None: on the whole vocabulary."""
    problem = problems.cross_problem(sizes, rows, cache)
    sample, dense = _teacher(sizes, rows, cache)
    dense = dense[torch.from_numpy(_boundary_rows(problem, sample))]
    fold = torch.from_numpy(problem.projection.fold.astype(np.int64))
    bare = without_paths(problem.rows)

    def payload() -> TeacherRows:
        if columns is None:
            return replace(bare, topk_ids=None, topk_logprobs=whole_rows(dense, fold).numpy())
        ids, top, tail = shared_lists(dense, fold, columns)
        return replace(
            bare,
            topk_ids=ids.numpy().astype(np.int32),
            topk_logprobs=top.numpy(),
            log_tail=tail.numpy(),
        )

    def formula(student: Tensor) -> Tensor:
        lists = plain_lists(dense.to(student.dtype), fold, columns, bare)
        weights = problems.sparse_weights(problem.projection, sizes[0], student.dtype)
        paths = problems.paths_of(replace(problem, rows=bare), student.dtype)
        return formulas.ctkd(student, lists, paths, weights)

    what = "the whole vocabulary" if columns is None else f"its likeliest {columns} columns + tail"
    return CtkdCase(
        problem=problem,
        rows=payload,
        loss=build_loss("ctkd", problem.shard, beta=0.0),
        formula=formula,
        what=f"dense teacher -> {what}, fold",
    )


def top_lists(logits: Tensor, token: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids [T, k], log-probabilities [T, k], log of the rest [T] and of the actual tokens [T]."""
    shard = VocabShard(start=0, size=logits.shape[1], vocab_size=logits.shape[1])
    ids = torch.empty(len(logits), k, dtype=torch.int64)
    top, tail = logits.new_empty(len(logits), k), logits.new_empty(len(logits))
    actual, room = torch.empty_like(tail), torch.empty_like(logits[:BLOCK])
    for begin in range(0, len(logits), BLOCK):
        cut = slice(begin, min(begin + BLOCK, len(logits)))
        probs = shard.softmax(logits[cut], out=room[: cut.stop - begin])
        actual[cut] = probs.gather(1, token[cut, None])[:, 0]
        top[cut], ids[cut] = probs.topk(k, dim=-1)
        tail[cut] = probs.scatter_(1, ids[cut], 0.0).sum(dim=-1)
    return ids, top.log_(), tail.log_(), actual.log_()


def shared_lists(dense: Tensor, fold: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Columns [G], log-probabilities [R, G] and log-tails [R] of teacher logits [R, V_T].

    Chosen are the ``k`` columns with the highest probability in any row; then they fold.
    """
    probs = _softmax(dense)
    chosen = probs.amax(dim=0).topk(k).indices.sort().values
    outside = probs.new_ones(probs.shape[1]).index_fill_(0, chosen, 0.0)
    columns, place = torch.unique(fold[chosen], return_inverse=True)
    mass = probs.new_zeros(len(probs), len(columns)).index_add_(1, place, probs[:, chosen])
    tail = probs @ outside
    if columns[-1] == len(fold):  # what folds to null
        tail, columns, mass = tail + mass[:, -1], columns[:-1], mass[:, :-1]
    return columns, mass.log(), tail.log()


def whole_rows(dense: Tensor, fold: Tensor) -> Tensor:
    """[R, V_T] logs of the folded masses; what folds to null is left out."""
    probs = _softmax(dense)
    moved = torch.nonzero(fold != torch.arange(len(fold)))[:, 0]
    kept = moved[fold[moved] < len(fold)]
    probs.index_add_(1, fold[kept], probs[:, kept])
    return probs.index_fill_(1, moved, 0.0).log_()


def plain_lists(
    dense: Tensor, fold: Tensor, columns: int | None, rows: TeacherRows
) -> formulas.Lists:
    """The same bins as `shared_lists`, or `whole_rows`, over one column more for null."""
    probs = torch.softmax(dense, -1)
    size = len(fold)
    chosen = torch.arange(size)
    if columns is not None:
        chosen = probs.amax(0).topk(columns).indices
    folded = probs.new_zeros(len(probs), size + 1).index_add_(1, fold[chosen], probs[:, chosen])
    ids = torch.unique(fold[chosen])
    ids = ids[ids < size]
    listed = folded[:, ids]
    if columns is None:
        listed = listed / listed.sum(-1, keepdim=True)
    return formulas.Lists(
        position=torch.from_numpy(rows.position),
        ids=ids.expand(listed.shape),
        probs=listed,
        tail=(1.0 - listed.sum(-1)).clamp_min(0.0),
    )


def without_paths(rows: TeacherRows) -> TeacherRows:
    names = ("path_position", "path_weight", "path_target", "path_entry", "path_entry_slot")
    none = {name: getattr(rows, name)[:0] for name in names}
    return replace(rows, path_offsets=np.zeros(1, dtype=np.int64), **none)


def _softmax(dense: Tensor) -> Tensor:
    shard = VocabShard(start=0, size=dense.shape[1], vocab_size=dense.shape[1])
    out = torch.empty_like(dense)
    for begin in range(0, len(dense), BLOCK):
        shard.softmax(dense[begin : begin + BLOCK], out=out[begin : begin + BLOCK])
    return out


def _teacher(sizes: Sizes, rows: int, cache: Path) -> tuple[problems.Sequence, Tensor]:
    """The sample of `problems.cross_problem`, and logits [T, V_T] of a teacher that knows it."""
    of = problems.pair(sizes, cache)
    parts = [vocabularies.text(of.words, d, rows, seed=3) for d in vocabularies.DOMAINS]
    share = rows // len(vocabularies.DOMAINS)
    encoded = [vocabularies.token_ids(of.student, part)[:share] for part in parts]
    ids = np.concatenate(encoded)
    theirs = np.asarray(of.teacher.encode(of.student.decode(ids)), dtype=np.int32)
    scores: TeacherScores = problems.scores_of(theirs, of.teacher, seed=4)
    sample = problems.Sequence(
        student_ids=ids, student_ends=of.student.byte_ends(ids), scores=scores
    )
    logits = problems.peaked_logits(len(theirs), sizes[1], seed=8)
    logits[torch.arange(len(theirs)), torch.from_numpy(theirs).long()] += 10.0
    return sample, logits


def _boundary_rows(problem: problems.CrossProblem, sample: problems.Sequence) -> np.ndarray:
    """[R] the teacher's row of each boundary row of the problem."""
    alignment, _ = problems.aligned(sample, problems.payload_options(problem.projection))
    row = np.full(len(sample.student_ids) + 1, -1)
    row[alignment.student_starts] = alignment.teacher_starts
    return row[problem.rows.position]
