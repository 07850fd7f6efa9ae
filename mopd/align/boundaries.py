"""Alignment of two tokenizations of the same bytes at their common byte boundaries.

Both sides count the bytes after each token; the chunks between two counts that both sides have are
the finest partition with equal text on both sides (docs/losses.md, alignment).
"""

from __future__ import annotations

import numpy as np

from mopd.types import Alignment

CHUNK_TYPES = ("1-1", "1-n", "n-1", "n-m")  # student tokens - teacher tokens


def align_bytes(
    student_ends: np.ndarray, teacher_ends: np.ndarray, *, both_end_turn: bool
) -> Alignment:
    """Chunks of two tokenizations.

    Args:
        student_ends: [S] int64, bytes after each student text token (no end-of-turn token).
        teacher_ends: [T] int64, the same of the teacher, over the same bytes from the start.
        both_end_turn: both sides go on with their end-of-turn token, which is paired 1-1.
    A tail whose bytes differ in length (a cut answer) stays outside every chunk.
    """
    common = np.intersect1d(student_ends, teacher_ends)
    student = np.searchsorted(student_ends, common) + 1
    teacher = np.searchsorted(teacher_ends, common) + 1
    return _alignment(student, teacher, len(student_ends), len(teacher_ends), both_end_turn)


def align_positions(num_student: int, num_teacher: int) -> Alignment:
    """Token k with token k, whatever they spell: a negative control that trains on nonsense."""
    starts = np.arange(min(num_student, num_teacher) + 1, dtype=np.int64)
    return Alignment(student_starts=starts, teacher_starts=starts, ends_turn=False)


def _alignment(
    student: np.ndarray,
    teacher: np.ndarray,
    num_student: int,
    num_teacher: int,
    both_end_turn: bool,
) -> Alignment:
    reaches_end = (
        both_end_turn
        and (student[-1] if len(student) else 0) == num_student
        and (teacher[-1] if len(teacher) else 0) == num_teacher
    )
    last = [1] if reaches_end else []
    zero = np.zeros(1, dtype=np.int64)
    return Alignment(
        student_starts=np.concatenate([zero, student, np.asarray(last) + num_student]).astype(
            np.int64
        ),
        teacher_starts=np.concatenate([zero, teacher, np.asarray(last) + num_teacher]).astype(
            np.int64
        ),
        ends_turn=bool(reaches_end),
    )


def chunk_sizes(alignment: Alignment) -> np.ndarray:
    """[C, 2] int64: student and teacher tokens of each chunk."""
    return np.stack([np.diff(alignment.student_starts), np.diff(alignment.teacher_starts)], axis=1)


def chunk_counts(alignment: Alignment) -> dict[str, tuple[int, int]]:
    """Per chunk type: (number of chunks, number of student tokens in them)."""
    sizes = chunk_sizes(alignment)
    kind = 2 * (sizes[:, 0] > 1) + (sizes[:, 1] > 1)
    return {
        name: (int((kind == k).sum()), int(sizes[kind == k, 0].sum()))
        for k, name in enumerate(CHUNK_TYPES)
    }
