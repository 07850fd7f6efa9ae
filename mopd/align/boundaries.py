"""Common byte boundaries of two tokenizations, and the chunks between them.

Both sides count the bytes after each token; the chunks between two counts that both sides have are
the finest partition with equal text on both sides (docs/losses.md, alignment). All of it is linear
in the number of bytes and without a loop over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mopd.types import Alignment, ragged_arange

CHUNK_TYPES = ("1-1", "1-n", "n-1", "n-m")  # student tokens - teacher tokens
_STUDENT, _TEACHER, _BOTH = 1, 2, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadIndex:
    """Where the rows of an alignment go: C chunks, N student tokens in them."""

    position: np.ndarray  # [C] int64: the prediction index of each chunk's first student token
    row: np.ndarray  # [C] int64: the teacher's row of its first teacher token
    size: np.ndarray  # [C, 2] int64: student and teacher tokens
    token_position: np.ndarray  # [N] int64: prediction index of every student token
    token_chunk: np.ndarray  # [N] int64: index of its chunk


def align_bytes(
    student_ends: np.ndarray, teacher_ends: np.ndarray, *, both_end_turn: bool
) -> Alignment:
    """Chunks of two tokenizations.

    Args:
        student_ends: [S] int64, bytes after each student text token (no end-of-turn token).
        teacher_ends: [T] int64, the same of the teacher, over the same bytes from the start.
        both_end_turn: both sides go on with their end-of-turn token, which is paired 1-1.
    A tail whose bytes differ in length (a cut answer) stays outside every chunk. A token of length
    0 ends nowhere: it belongs to the chunk of the next token that has a length.
    """
    student, teacher = common_boundaries(student_ends, teacher_ends)
    return alignment_of(
        student + 1,
        teacher + 1,
        num_student=len(student_ends),
        num_teacher=len(teacher_ends),
        both_end_turn=both_end_turn,
    )


def common_boundaries(
    student_ends: np.ndarray, teacher_ends: np.ndarray, *, limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the tokens, one of each side, that end at a byte count which both sides have.

    ``limit`` is the number of bytes up to which the two sides are one text (None: all).
    """
    if not len(student_ends) or not len(teacher_ends):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    size = int(min(student_ends[-1], teacher_ends[-1], *([] if limit is None else [limit])))
    student = student_ends[: np.searchsorted(student_ends, size, side="right")]
    teacher = teacher_ends[: np.searchsorted(teacher_ends, size, side="right")]
    marks = np.zeros(size + 1, dtype=np.uint8)
    marks[student] = _STUDENT
    marks[teacher] |= _TEACHER
    marks[0] = 0
    return _at_boundary(student, marks), _at_boundary(teacher, marks)


def _at_boundary(ends: np.ndarray, marks: np.ndarray) -> np.ndarray:
    found = marks[ends] == _BOTH
    found[1:] &= ends[1:] != ends[:-1]  # of tokens with one end, the first has the bytes
    return np.flatnonzero(found)


def align_positions(num_student: int, num_teacher: int) -> Alignment:
    """Token k with token k, whatever they spell: a negative control that trains on nonsense."""
    starts = np.arange(min(num_student, num_teacher) + 1, dtype=np.int64)
    return Alignment(student_starts=starts, teacher_starts=starts, ends_turn=False)


def alignment_of(
    student: np.ndarray,
    teacher: np.ndarray,
    *,
    num_student: int,
    num_teacher: int,
    both_end_turn: bool,
    begin: tuple[int, int] = (0, 0),
) -> Alignment:
    """From the token indices behind each chunk, [C] on both sides.

    ``begin`` is the first token of each side that belongs to the text; the end-of-turn tokens stand
    at ``num_student`` and ``num_teacher`` and are paired if the text of both reaches up to them.
    """
    reached = (student[-1], teacher[-1]) if len(student) else begin
    ends_turn = both_end_turn and reached == (num_student, num_teacher)
    starts = []
    for first, inner, last in ((begin[0], student, num_student), (begin[1], teacher, num_teacher)):
        row = np.empty(len(inner) + 1 + ends_turn, dtype=np.int64)
        row[0] = first
        row[1 : 1 + len(inner)] = inner
        row[1 + len(inner) :] = last + 1
        starts.append(row)
    return Alignment(student_starts=starts[0], teacher_starts=starts[1], ends_turn=bool(ends_turn))


def chunk_sizes(alignment: Alignment) -> np.ndarray:
    """[C, 2] int64: student and teacher tokens of each chunk."""
    return np.stack([np.diff(alignment.student_starts), np.diff(alignment.teacher_starts)], axis=1)


def payload_index(alignment: Alignment, *, kept: np.ndarray | None = None) -> PayloadIndex:
    """The index arrays of the chunks, or of those that ``kept`` [C] bool names."""
    position, row = alignment.student_starts[:-1], alignment.teacher_starts[:-1]
    size = chunk_sizes(alignment)
    if kept is not None and not kept.all():
        position, row, size = position[kept], row[kept], size[kept]
    return PayloadIndex(
        position=position,
        row=row,
        size=size,
        token_position=ragged_arange(position, size[:, 0]),
        token_chunk=np.repeat(np.arange(len(position)), size[:, 0]),
    )


def chunk_counts(
    alignment: Alignment, *, kept: np.ndarray | None = None
) -> dict[str, tuple[int, int]]:
    """Per chunk type: (number of chunks, number of student tokens in them)."""
    sizes = chunk_sizes(alignment) if kept is None else chunk_sizes(alignment)[kept]
    kind = 2 * (sizes[:, 0] > 1) + (sizes[:, 1] > 1)
    return {
        name: (int((kind == k).sum()), int(sizes[kind == k, 0].sum()))
        for k, name in enumerate(CHUNK_TYPES)
    }
