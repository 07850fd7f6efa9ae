"""Where the tokens of a lossy tokenizer end in the ORIGINAL bytes.

A tokenizer that normalises, or drops white space, has tokens whose bytes do not add up to the text
it read. Its own character offsets say where they ended; where these cannot be used, the canonical
texts of both are matched. A token that does not end at a known place gets the end of the token
before it: it has length 0, and belongs to the chunk of the next token that has one.

Text that the tokenizer dropped belongs to the token behind it, at the end of a text to the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mopd.tokens.utf8 import (
    canonical,
    canonical_character,
    character_ends,
    characters,
    is_mark,
)

Method = Literal["bytes", "offsets", "strings"]

_GRAM = 8  # canonical characters that must agree before two texts count as being in step again
_WINDOW = 256  # how far to look for them


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A text in a tokenizer's ids; ``byte_ends`` count the bytes of the text, not of the tokens."""

    ids: list[int]
    byte_ends: np.ndarray  # [T] int64
    method: Method


def offset_ends(
    text: str, offsets: Sequence[tuple[int, int]], pieces: Sequence[bytes]
) -> np.ndarray | None:
    """[T] int64 byte ends from character offsets; None when the offsets make no sense.

    Several tokens on the same characters (a character in pieces, a ligature taken apart) end
    together, unless their bytes are exactly the bytes of those characters.
    """
    spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    if not len(spans):
        return np.zeros(0, dtype=np.int64)
    begin, end = spans[:, 0], spans[:, 1]
    backward = (np.diff(begin) < 0).any() or (np.diff(end) < 0).any() or (begin > end).any()
    if backward or begin[0] < 0 or end[-1] > len(text) or end[-1] == 0:
        return None
    closed = np.append(end[:-1] <= begin[1:], True)
    bytes_before = np.concatenate([[0], character_ends(text)])
    marked = [_after_marks(text, e, b) for e, b in zip(end[:-1], begin[1:], strict=True)]
    last = len(text) if not canonical(text[end[-1] :]) else int(end[-1])
    ends = bytes_before[[*marked, last]]
    data = text.encode()
    first = 0
    for token in np.flatnonzero(closed).tolist():
        if token > first:
            group = slice(first, token + 1)
            start, stop = bytes_before[begin[first]], bytes_before[end[token]]
            if b"".join(pieces[group]) == data[start:stop]:
                ends[first:token] = start + np.cumsum([len(p) for p in pieces[first:token]])
            else:
                ends[first:token] = ends[first - 1] if first else 0
        first = token + 1
    return ends


def _after_marks(text: str, end: int, limit: int) -> int:
    """``end`` moved behind the marks that the tokenizer dropped there."""
    while end < limit and is_mark(text[end]):
        end += 1
    return end


def string_ends(data: bytes, pieces: Sequence[bytes]) -> np.ndarray:
    """[T] int64 byte ends in ``data`` of pieces that say roughly the same text.

    Both texts are made canonical and walked together; after a difference the walk goes on at the
    nearest place where they agree for a while. Linear in the length of the texts.
    """
    text, spelled = characters(data), characters(b"".join(pieces))
    if not text or not spelled:
        return np.zeros(len(pieces), dtype=np.int64)
    wanted, found = _canonical_counts(text), _canonical_counts(spelled)
    runs = common_runs(canonical(text), canonical(spelled))
    text_ends, spelled_ends = character_ends(text), character_ends(spelled)
    ends = np.zeros(len(pieces), dtype=np.int64)
    previous = run = 0
    for token, end in enumerate(np.cumsum([len(p) for p in pieces]).tolist()):
        at = int(np.searchsorted(spelled_ends, end))
        if at < len(spelled_ends) and spelled_ends[at] == end:
            there = int(found[at])
            while run < len(runs) and there > runs[run][1] + runs[run][2]:
                run += 1
            if run < len(runs) and there >= runs[run][1]:
                here = runs[run][0] + there - runs[run][1]
                previous = max(previous, _byte_of(here, text, wanted, text_ends))
        ends[token] = previous
    if previous and not canonical(characters(data[previous:])):
        ends[ends == previous] = len(data)
    return ends


def _canonical_counts(text: str) -> np.ndarray:
    """[characters] int64: canonical characters up to and with each."""
    return np.cumsum([len(canonical_character(c)) for c in text])


def _byte_of(count: int, text: str, counts: np.ndarray, ends: np.ndarray) -> int:
    """Bytes before which ``text`` has ``count`` canonical characters; 0 inside a character."""
    at = int(np.searchsorted(counts, count))
    if count == 0 or at == len(counts) or counts[at] != count:
        return 0
    return int(ends[_after_marks(text, at + 1, len(text)) - 1])


def common_runs(left: str, right: str) -> list[tuple[int, int, int]]:
    """(begin in ``left``, begin in ``right``, length) of equal stretches, in order."""
    runs: list[tuple[int, int, int]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        size = _common_prefix(left, i, right, j)
        if size:
            runs.append((i, j, size))
        step = _resume(left, i + size, right, j + size)
        if step is None:
            break
        i, j = step
    return runs


def _common_prefix(left: str, i: int, right: str, j: int) -> int:
    limit = min(len(left) - i, len(right) - j)
    low, high = 0, 1
    while low < limit:  # steps that double while they agree, and halve where they do not
        high = min(high, limit - low)
        if left[i + low : i + low + high] == right[j + low : j + low + high]:
            low, high = low + high, 2 * high
        elif high == 1:
            break
        else:
            high //= 2
    return low


def _resume(left: str, i: int, right: str, j: int) -> tuple[int, int] | None:
    """The nearest place behind (i, j) from which both go on alike; their very ends count too."""
    grams: dict[str, int] = {}
    for y in range(j, min(j + _WINDOW, len(right))):
        grams.setdefault(right[y : y + _GRAM], y)
    best: tuple[int, int] | None = None
    for x in range(i, min(i + _WINDOW, len(left))):
        y = grams.get(left[x : x + _GRAM])
        if y is not None and (best is None or x + y < sum(best)):
            best = (x, y)
    return best
