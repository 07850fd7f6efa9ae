"""The student's own next token at every place of an answer, where its own encoding has one.

A walk (docs/losses.md, path terms) ends where the teacher's pieces leave the student's longer
tokens. What is left then belongs to the longest token walked past: a guess, and a wrong one where
the teacher merges across two student tokens or the student's merges are not left to right. The
student's own encoding of the answer knows better.
"""

from __future__ import annotations

import numpy as np


def canonical_next(
    byte_ends: np.ndarray, own_ids: np.ndarray, own_ends: np.ndarray, *, ended: bool
) -> np.ndarray:
    """[S] int64: the token of the own encoding that begins where each sampled token does, or -1.

    Args:
        byte_ends: [S] of the sampled tokens; own_ids, own_ends: [N] the tokenizer's own encoding of
            the same bytes.
        ended: whether the answer came to its end; else its last own token may have gone on.
    """
    begins = np.concatenate([[0], byte_ends[:-1]]) if len(byte_ends) else np.zeros(0, np.int64)
    count = len(own_ids) - (not ended)
    if count <= 0:
        return np.full(len(begins), -1, dtype=np.int64)
    own_begins = np.concatenate([[0], own_ends[: count - 1]])
    place = np.minimum(np.searchsorted(own_begins, begins), count - 1)
    return np.where(own_begins[place] == begins, own_ids[place], -1).astype(np.int64)
