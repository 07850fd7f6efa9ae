"""The teacher's rows carried over to the student's tokens.

``pull`` reads one row, p'(s) = sum_j decay^j p(piece j of s), and ``decayed`` the rows along the
actual text, p'(s) = sum_j decay^j r_j(piece j of s), where r_j is the teacher's row after j more of
its tokens. Both count a first piece in full for every student token that begins with it, so they
are no coupling of the two vocabularies (docs/losses.md): they are here for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mopd.align.merge import Lists, largest_entries, native_rows, stacked, sum_entries
from mopd.align.temper import Tempered, row_blocks
from mopd.types import TeacherScores, ragged_arange


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Student tokens by their piece j: ``student[begin[t] :][: count[t]]`` for teacher token t."""

    student: np.ndarray  # [n] int64
    piece: np.ndarray  # [n] int64, ascending
    begin: np.ndarray  # [largest piece + 2] int64
    count: np.ndarray  # the same


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """The teacher's own spelling of each student token, before any fold.

    Args:
        piece_ptr: [V_S + 1] int64 into piece: [nnz] int32 teacher tokens; a token that the teacher
            cannot spell has none.
        decay: what piece j counts, as ``decay ** j``.
        top_k: student tokens per row; the rest is the tail.
    """

    piece_ptr: np.ndarray
    piece: np.ndarray
    decay: float
    top_k: int

    @cached_property
    def levels(self) -> list[Level]:
        """The student tokens that have a piece j, for every j that counts."""
        count = np.diff(self.piece_ptr)
        size = int(self.piece.max(initial=-1)) + 1
        found = []
        for level in range(int(count.max(initial=0))):
            if self.decay**level == 0.0:
                break
            student = np.flatnonzero(count > level)
            piece = self.piece[self.piece_ptr[student] + level].astype(np.int64)
            order = np.argsort(piece, kind="stable")
            # the last entry is that of teacher tokens which are nobody's piece
            number = np.append(np.bincount(piece, minlength=size), 0)
            found.append(
                Level(
                    student=student[order],
                    piece=piece[order],
                    begin=np.cumsum(number) - number,
                    count=number,
                )
            )
        return found


def pulled_rows(
    scores: TeacherScores,
    tempered: Tempered,
    *,
    position: np.ndarray,
    row: np.ndarray,
    pieces: Pieces,
    decayed: bool,
) -> dict[str, np.ndarray]:
    """The native fields of `TeacherRows`: a row per boundary, normalised over the student's tokens.

    The boundary row's own tail stays what it is, one event that no student token stands for. Rows
    behind the end of the response or failed ones contribute nothing. A boundary whose listed
    tokens begin no student token has no row.
    """
    after = np.arange(len(pieces.levels)) if decayed else np.zeros(len(pieces.levels), dtype=int)
    source = row[:, None] + after
    inside = source < len(scores.valid)
    source = np.where(inside, source, 0)
    present = inside & scores.valid[source] if len(row) else inside
    if scores.topk_ids is None:
        lists = _from_whole_rows(tempered, source, present, pieces)
    else:
        # a common piece begins many student tokens: blocks bound what is held at once
        width = 8 * scores.topk_ids.shape[1]
        lists = stacked(
            [
                _from_lists(scores.topk_ids, tempered, source[part], present[part], pieces)
                for part in row_blocks(len(row), width)
            ],
            width=pieces.top_k,
        )
    assert lists.ids is not None
    mass = np.exp(lists.logprobs.astype(np.float64)).sum(axis=1)
    log_tail = np.logaddexp(lists.log_tail, tempered.log_tail[row]).astype(np.float64)
    some = mass > 0
    with np.errstate(divide="ignore"):
        total = np.log(mass + np.exp(log_tail))[some]
    normalised = Lists(
        ids=lists.ids[some],
        logprobs=(lists.logprobs[some] - total[:, None]).astype(np.float32),
        log_tail=(log_tail[some] - total).astype(np.float32),
    )
    return native_rows(position[some], normalised)


def _from_lists(
    topk_ids: np.ndarray,
    tempered: Tempered,
    source: np.ndarray,
    present: np.ndarray,
    pieces: Pieces,
) -> Lists:
    """``source`` [R, levels]: the teacher row that each level reads, where ``present``."""
    rows, tokens, masses = [np.zeros(0, int)], [np.zeros(0, int)], [np.zeros(0)]
    for number, level in enumerate(pieces.levels):
        teacher = source[:, number]
        of, column = np.nonzero((topk_ids[teacher] >= 0) & present[:, number, None])
        listed = np.minimum(topk_ids[teacher[of], column], len(level.count) - 1)
        count = level.count[listed]
        prob = np.exp(tempered.at(teacher[of], column).astype(np.float64))
        rows.append(np.repeat(of, count))
        tokens.append(level.student[ragged_arange(level.begin[listed], count)])
        masses.append(np.repeat(prob, count) * pieces.decay**number)
    owner, token, _, mass = sum_entries(
        np.concatenate(rows), np.concatenate(tokens), np.concatenate(masses)
    )
    return largest_entries(owner, token, mass, num_rows=len(source), width=pieces.top_k)


def _from_whole_rows(
    tempered: Tempered, source: np.ndarray, present: np.ndarray, pieces: Pieces
) -> Lists:
    size = len(pieces.piece_ptr) - 1
    width = min(pieces.top_k, size)
    ids = np.full((len(source), width), -1, dtype=np.int32)
    logprobs = np.full((len(source), width), -np.inf, dtype=np.float32)
    log_tail = np.full(len(source), -np.inf, dtype=np.float32)
    for part in row_blocks(len(source), size):
        mass = np.zeros((part.stop - part.start, size))
        for number, level in enumerate(pieces.levels):
            teacher = source[part, number, None]
            prob = np.exp(tempered.at(teacher, level.piece[None]).astype(np.float64))
            prob = np.where(present[part, number, None], prob, 0.0)
            mass[:, level.student] += prob * pieces.decay**number
        top = np.argpartition(-mass, width - 1, axis=1)[:, :width]
        inside = np.take_along_axis(mass, top, axis=1)
        np.put_along_axis(mass, top, 0.0, axis=1)
        with np.errstate(divide="ignore"):
            ids[part], logprobs[part] = np.where(inside > 0, top, -1), np.log(inside)
            log_tail[part] = np.log(mass.sum(axis=1))
    return Lists(ids=ids, logprobs=logprobs, log_tail=log_tail)
