"""Bytes that are not always text: where they are valid, where they break off, what they say."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import lru_cache

import numpy as np


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def valid_spans(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """``data`` cut into the longest valid UTF-8 parts (True) and the invalid rest (False)."""
    while data:
        try:
            data.decode()
        except UnicodeDecodeError as error:
            if error.start:
                yield data[: error.start], True
            yield data[error.start : error.end], False
            data = data[error.end :]
        else:
            yield data, True
            return


def incomplete_utf8_tail(data: bytes) -> int:
    """Number of bytes at the end that begin a UTF-8 character without finishing it (0 to 3)."""
    for size in range(1, min(3, len(data)) + 1):
        lead = data[-size]
        if lead & 0xC0 == 0x80:
            continue
        needed = 2 if lead >> 5 == 0b110 else 3 if lead >> 4 == 0b1110 else 4
        return size if lead >= 0xC2 and lead <= 0xF4 and needed > size else 0
    return 0


def characters(data: bytes) -> str:
    """``data`` as text in which every invalid byte is one surrogate."""
    return data.decode(errors="surrogateescape")


def character_ends(text: str) -> np.ndarray:
    """[characters] int64: bytes after each character of `characters`."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    lengths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    return np.cumsum(np.where((points >= 0xDC80) & (points <= 0xDCFF), 1, lengths))


@lru_cache(maxsize=65536)
def canonical_character(character: str) -> str:
    """What is left of a character when tokenizers that normalise may differ about the rest.

    Compatibility forms are decomposed and case is folded; accents, white space and control
    characters are nothing.
    """
    folded = unicodedata.normalize("NFKD", character).casefold()
    return "".join(c for c in unicodedata.normalize("NFKD", folded) if not _is_dropped(c))


def canonical(text: str) -> str:
    """`canonical_character` of all of ``text``: equal where only normalisation differs."""
    return "".join(map(canonical_character, text))


def is_mark(character: str) -> bool:
    """An accent or a variation selector, which belongs to the character before it."""
    return unicodedata.category(character) == "Mn"


def _is_dropped(character: str) -> bool:
    return unicodedata.category(character) in ("Mn", "Cc", "Cf", "Zs", "Zl", "Zp")
