"""Alignment of two sequences of ids, with their texts compared byte by byte.

Where both spell the same bytes, the bytes give the boundaries. Where they do not, a tokenizer that
normalises has its own account of where its tokens end (mopd/tokens/reading.py); every chunk is then
kept only if both sides say the same but for normalisation. Any other difference is an error of the
teacher's: chunks end before it, and it is reported.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mopd.align.boundaries import alignment_of, common_boundaries
from mopd.tokens.reading import Method
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import Alignment


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenText:
    """One side: its text tokens, without the end of the turn.

    ``byte_ends`` [S] counts the bytes of the response, as `Vocabulary.read` does; None where every
    token is exactly its bytes.
    """

    ids: np.ndarray  # [S] int32
    vocabulary: Vocabulary
    byte_ends: np.ndarray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextAlignment:
    """An alignment and how far it can be trusted.

    Chunks that are not ``kept`` have different texts, or a token that no text has, on one side;
    ``mismatch`` is the first byte that differs where nothing explains it.
    """

    alignment: Alignment
    kept: np.ndarray  # [C] bool
    method: Method
    mismatch: int | None = None

    @property
    def covered(self) -> int:
        """Student tokens in the chunks that are kept."""
        return int(np.diff(self.alignment.student_starts)[self.kept].sum())

    def trainable(self, loss_mask: np.ndarray) -> np.ndarray:
        """[S] bool: ``loss_mask`` without the first tokens of the chunks that are not kept."""
        mask = loss_mask.copy()
        mask[self.alignment.student_starts[:-1][~self.kept]] = False
        return mask


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spelled:
    """The tokens ``begin:stop`` of a side, which are its text: what frames them is cut off."""

    begin: int
    stop: int
    ends: np.ndarray  # [stop - begin]
    data: np.ndarray  # [N] uint8
    unaligned: np.ndarray  # [stop - begin] bool: tokens inside it that no text has


def align_tokens(student: TokenText, teacher: TokenText, *, both_end_turn: bool) -> TextAlignment:
    """Chunks with equal text; see the module. The student's ids are what it wrote, its bytes the
    text; ``both_end_turn`` as in `align_bytes`."""
    ours, theirs = _spell(student), _spell(teacher)
    same = common_prefix(ours.data, theirs.data)
    ends, method, mismatch = theirs.ends, "bytes", None
    if same < min(len(ours.data), len(theirs.data)) or _was_read_otherwise(teacher, theirs):
        located = _located(ours, teacher, theirs)
        if located is not None and located[1] != "bytes":
            ends, method = located
        elif same < min(len(ours.data), len(theirs.data)):
            mismatch = same
    limit = same if method == "bytes" else None
    found_student, found_teacher = common_boundaries(ours.ends, ends, limit=limit)
    alignment = alignment_of(
        found_student + (ours.begin + 1),
        found_teacher + (theirs.begin + 1),
        num_student=len(student.ids),
        num_teacher=len(teacher.ids),
        both_end_turn=both_end_turn,
        begin=(ours.begin, theirs.begin),
    )
    kept = _without_unaligned(alignment, ours, theirs)
    if method != "bytes":
        kept &= _same_text(alignment, ours, teacher)
    return TextAlignment(alignment=alignment, kept=kept, method=method, mismatch=mismatch)


def common_prefix(left: np.ndarray, right: np.ndarray) -> int:
    """Number of leading entries in which two arrays agree."""
    size = min(len(left), len(right))
    differs = left[:size] != right[:size]
    return int(differs.argmax()) if differs.any() else size


def _spell(side: TokenText) -> _Spelled:
    table, every = side.vocabulary.table, side.vocabulary.unaligned
    rows = table.rows(side.ids)
    unaligned = every[rows]
    begin, stop = 0, len(rows)
    frames = unaligned
    if side.byte_ends is not None:  # what was written out is text, if text that nobody judges
        frames = unaligned & (np.diff(side.byte_ends, prepend=0) == 0)
    if frames.any():
        text = np.flatnonzero(~frames)
        begin, stop = (int(text[0]), int(text[-1]) + 1) if len(text) else (0, 0)
        rows, unaligned = rows[begin:stop], unaligned[begin:stop]
    ends = table.ends(rows)
    data = table.spell(rows, ends)
    return _Spelled(begin=begin, stop=stop, ends=ends, data=data, unaligned=unaligned)


def _was_read_otherwise(side: TokenText, spelled: _Spelled) -> bool:
    """Whether the tokens end elsewhere in the response than their own bytes do.

    Dropped white space at the end, for one, leaves the bytes of both sides equal as far as they go.
    """
    if side.byte_ends is None or not len(spelled.ends):
        return False
    return bool(side.byte_ends[spelled.stop - 1] != spelled.ends[-1])


def _located(
    ours: _Spelled, teacher: TokenText, theirs: _Spelled
) -> tuple[np.ndarray, Method] | None:
    """Ends of the teacher's text tokens in the student's bytes, by other means than their bytes."""
    data = ours.data.tobytes()
    if teacher.byte_ends is not None and len(teacher.byte_ends):
        data = data[: int(teacher.byte_ends[-1])]  # a beginning of a character may be missing
    ids = teacher.ids[theirs.begin : theirs.stop].tolist()
    reading = teacher.vocabulary.locate(ids, data)
    return None if reading is None else (reading.byte_ends, reading.method)


def _without_unaligned(alignment: Alignment, ours: _Spelled, theirs: _Spelled) -> np.ndarray:
    """[C] bool: chunks of text tokens only."""
    kept = np.ones(alignment.num_chunks, dtype=bool)
    count = alignment.num_chunks - int(alignment.ends_turn)
    sides = ((alignment.student_starts, ours), (alignment.teacher_starts, theirs))
    for starts, side in sides:
        if count and side.unaligned.any():
            inside = side.unaligned[: starts[count] - side.begin]
            kept[:count] &= ~np.logical_or.reduceat(inside, starts[:count] - side.begin)
    return kept


def _same_text(alignment: Alignment, ours: _Spelled, teacher: TokenText) -> np.ndarray:
    """[C] bool: chunks whose teacher tokens say what the student wrote there."""
    kept = np.ones(alignment.num_chunks, dtype=bool)
    count = alignment.num_chunks - int(alignment.ends_turn)
    data, ids = ours.data.tobytes(), teacher.ids.tolist()
    every_end = np.concatenate([[0], ours.ends])
    edges = every_end[alignment.student_starts[: count + 1] - ours.begin].tolist()
    bounds = alignment.teacher_starts.tolist()
    for chunk in range(count):
        spelled = ids[bounds[chunk] : bounds[chunk + 1]]
        kept[chunk] = teacher.vocabulary.says(spelled, data[edges[chunk] : edges[chunk + 1]])
    return kept
