"""One text in the tokens of two tokenizers, cut at their common byte boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mopd.align.boundaries import CHUNK_TYPES
from mopd.align.tokens import TextAlignment, TokenText
from mopd.align.tokens import align_tokens as align_token_texts
from mopd.api.show import as_html, as_text
from mopd.api.tokenizers import Tokenizer
from mopd.errors import ArgumentError
from mopd.tokens.utf8 import incomplete_utf8_tail


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tokens of both sides that spell the same bytes.

    ``student`` and ``teacher`` index `AlignedText.student_ids` and ``teacher_ids``. ``kind`` is
    1-1, 1-n, n-1 or n-m: student tokens - teacher tokens. A chunk that is not ``kept`` takes no
    part in a loss: it holds a token that no text has, or the two sides' texts differ.
    """

    data: bytes
    student: range
    teacher: range
    kind: str
    kept: bool


@dataclass(frozen=True, kw_only=True)
class AlignedText:
    """A text aligned by bytes; print it, or show it in a notebook, to see its chunks.

    Row s of a student's logits [S, V_S] predicts ``student_ids[s]``, row t of a teacher's
    [T, V_T] predicts ``teacher_ids[t]``.
    """

    student: Tokenizer
    teacher: Tokenizer
    student_ids: np.ndarray  # [S] int32, the end of the turn included where there is one
    teacher_ids: np.ndarray  # [T] int32
    teacher_byte_ends: np.ndarray  # [T] int64: bytes of the text after each teacher token
    found: TextAlignment

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """The finest chunks with equal text, in order."""
        ours, theirs = self.found.alignment.student_starts, self.found.alignment.teacher_starts
        result = []
        for c, kept in enumerate(self.found.kept.tolist()):
            student = range(int(ours[c]), int(ours[c + 1]))
            teacher = range(int(theirs[c]), int(theirs[c + 1]))
            result.append(
                Chunk(
                    data=self.student.decode(self.student_ids[student.start : student.stop]),
                    student=student,
                    teacher=teacher,
                    kind=CHUNK_TYPES[2 * (len(student) > 1) + (len(teacher) > 1)],
                    kept=kept,
                )
            )
        return tuple(result)

    @property
    def coverage(self) -> float:
        """Share of the student's tokens in chunks that are kept; 1 for an empty text."""
        return self.found.covered / len(self.student_ids) if len(self.student_ids) else 1.0

    def __str__(self) -> str:
        return as_text(self._heading, self._columns)

    def _repr_html_(self) -> str:
        return as_html(self._heading, self._columns)

    def __repr__(self) -> str:
        return f"AlignedText({self._heading})"

    @property
    def _heading(self) -> str:
        return (
            f"{len(self.student_ids)} student tokens, {len(self.teacher_ids)} teacher tokens, "
            f"{len(self.chunks)} chunks, {100 * self.coverage:.1f}% of the student's tokens aligned"
        )

    @property
    def _columns(self) -> list[tuple[list[str], list[str], bool]]:
        """Tokens of each chunk as text, and of what is in none."""
        ours = [self._name(self.student, int(i)) for i in self.student_ids]
        theirs = [self._name(self.teacher, int(i)) for i in self.teacher_ids]
        columns, begin = [], (0, 0)
        for chunk in self.chunks:
            rest = ours[begin[0] : chunk.student.start], theirs[begin[1] : chunk.teacher.start]
            if any(rest):
                columns.append((*rest, False))
            student = ours[chunk.student.start : chunk.student.stop]
            teacher = theirs[chunk.teacher.start : chunk.teacher.stop]
            columns.append((student, teacher, chunk.kept))
            begin = chunk.student.stop, chunk.teacher.stop
        if any(rest := (ours[begin[0] :], theirs[begin[1] :])):
            columns.append((*rest, False))
        return columns

    @staticmethod
    def _name(tokenizer: Tokenizer, index: int) -> str:
        if index == tokenizer.eos_id:
            return "<end>"
        return tokenizer.decode([index]).decode("utf-8", errors="backslashreplace")


def align_text(
    text: str | bytes, student: Tokenizer, teacher: Tokenizer, *, end_turn: bool = False
) -> AlignedText:
    """Both tokenizers' own encodings of ``text``, aligned (docs/losses.md, alignment).

    Args:
        text: an answer, without a chat template around it.
        end_turn: both sides go on with their end-of-turn token, which is paired 1-1.
    Raises:
        ArgumentError: the student's tokens do not spell the text, or the teacher has no tokens for
            it.
    """
    ids = student.encode(text).tolist()
    return align_tokens([*ids, student.eos_id] if end_turn else ids, student, teacher)


def align_tokens(
    student_ids: Sequence[int] | np.ndarray,
    student: Tokenizer,
    teacher: Tokenizer,
    *,
    teacher_ids: Sequence[int] | np.ndarray | None = None,
) -> AlignedText:
    """What a student wrote, token by token, beside the teacher's tokens for the same bytes.

    Args:
        student_ids: [S] as they were sampled, with the end of the turn at most at the end.
        teacher_ids: [T]; None takes the teacher's own encoding of the student's bytes, and ends
            its turn where the student did.
    Raises:
        ArgumentError: an id outside the vocabulary, or bytes that the teacher has no token for.
    """
    ours = _ids(student_ids, student, "student_ids")
    student_ends = bool(len(ours)) and int(ours[-1]) == student.eos_id
    written = ours[:-1] if student_ends else ours
    data = student.decode(written)
    if teacher_ids is not None:
        theirs = _ids(teacher_ids, teacher, "teacher_ids")
        teacher_ends = bool(len(theirs)) and int(theirs[-1]) == teacher.eos_id
        read = theirs[:-1] if teacher_ends else theirs
        located = teacher.vocabulary.locate(read.tolist(), data)
        byte_ends = teacher.vocabulary.byte_ends(read) if located is None else located.byte_ends
    elif teacher.vocabulary.fingerprint == student.vocabulary.fingerprint:
        read, byte_ends = written, student.vocabulary.byte_ends(written)
        teacher_ends = student_ends
    else:
        read, byte_ends = _read(data, teacher, whole=student_ends)
        teacher_ends = student_ends
    found = align_token_texts(
        TokenText(
            ids=written,
            vocabulary=student.vocabulary,
            byte_ends=student.vocabulary.byte_ends(written),
        ),
        TokenText(ids=read, vocabulary=teacher.vocabulary, byte_ends=byte_ends),
        both_end_turn=student_ends and teacher_ends,
    )
    if teacher_ends:
        read = np.append(read, np.int32(teacher.eos_id))
        byte_ends = np.append(byte_ends, byte_ends[-1] if len(byte_ends) else 0)
    return AlignedText(
        student=student,
        teacher=teacher,
        student_ids=ours,
        teacher_ids=read,
        teacher_byte_ends=byte_ends,
        found=found,
    )


def _read(data: bytes, teacher: Tokenizer, *, whole: bool) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's tokens for ``data`` and where they end in it.

    An answer that was cut (not ``whole``) inside a character loses that beginning.
    """
    if not whole and (cut := incomplete_utf8_tail(data)):
        data = data[:-cut]
    reading = teacher.vocabulary.read(data)
    if data and not reading.ids:
        raise ArgumentError(
            f"{teacher.name}: the tokenizer has no tokens for this text; leave the text out, or "
            "take a teacher that has byte tokens"
        )
    return np.asarray(reading.ids, dtype=np.int32), reading.byte_ends


def _ids(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer, name: str) -> np.ndarray:
    found = np.asarray(ids)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ArgumentError(f"{name}: a list of token ids is wanted, got shape {found.shape}")
    if found.size and (found.min() < 0 or found.max() >= tokenizer.size):
        raise ArgumentError(
            f"{name}: ids of {tokenizer.name} are 0 to {tokenizer.size - 1}, got {found.min()} to "
            f"{found.max()}; were they made by another tokenizer?"
        )
    return found.astype(np.int32)
