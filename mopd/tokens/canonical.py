"""Which tokens may follow, so that a text stays in its tokenizer's own segmentation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mopd.tokens.vocabulary import Vocabulary

MAX_REMEMBERED_BYTES = 1 << 28  # of masks; then all are forgotten


class CanonicalNext:
    """`allowed` says which tokens keep a canonical text canonical.

    A new tail of the text, from its last pre-token boundary on, costs one encoding of the whole
    vocabulary; the answer is remembered. Without pre-tokens (SentencePiece on whole texts) every
    text is its own tail.

    Args:
        stop_ids: other tokens than the end of the turn that end an answer.
    """

    def __init__(self, vocabulary: Vocabulary, *, stop_ids: Sequence[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._ends = [vocabulary.eos_id, *stop_ids]
        self._all = np.ones(vocabulary.size, dtype=bool)
        self._found: dict[tuple[int, ...], np.ndarray] = {}

    @property
    def remembered_bytes(self) -> int:
        return len(self._found) * self._all.nbytes

    def allowed(self, ids: Sequence[int]) -> np.ndarray:
        """[V] bool: tokens v for which ``ids`` and v are the encoding of the bytes they spell.

        What ends an answer always is one. All are where ``ids`` is not canonical itself.
        """
        tail = tuple(ids[self._tail_begin(ids) :])
        if tail in self._found:
            return self._found[tail]
        text = self._vocabulary.decode(tail)
        if list(tail) != self._vocabulary.encode(text):
            return self._all  # not remembered: rows that have ended come with ever longer tails
        if self.remembered_bytes + self._all.nbytes > MAX_REMEMBERED_BYTES:
            self._found.clear()
        self._found[tail] = self._masked(tail, text)
        return self._found[tail]

    def _tail_begin(self, ids: Sequence[int]) -> int:
        """Where the last pre-token begins; before it, marks and spaces, which may yet join it."""
        words = self._vocabulary.pre_tokens(self._vocabulary.decode(ids))
        if len(words) != len(ids) or not words:
            return 0
        begin = words.index(words[-1])
        while begin and not _is_word(self._vocabulary.token_bytes[ids[begin - 1]]):
            begin -= 1
        return begin

    def _masked(self, tail: tuple[int, ...], text: bytes) -> np.ndarray:
        vocabulary = self._vocabulary
        encoded = vocabulary.encode_many([text + piece for piece in vocabulary.token_bytes])
        mask = np.array([ids == [*tail, v] for v, ids in enumerate(encoded)], dtype=bool)
        mask[self._ends] = True
        return mask


def _is_word(piece: bytes) -> bool:
    return any(c.isalnum() for c in piece.decode("utf-8", "replace"))
