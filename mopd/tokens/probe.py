"""Texts that tell tokenizers apart: two that cut all of them alike have the same merges and pieces.

A text stands between two control tokens, so nothing outside decides how it is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mopd.tokens import pieces
from mopd.tokens.utf8 import is_utf8

MAX_BYTES = 6_000_000  # of all texts together: every piece of 150,000 and a third of their merges
PIECE_BYTES = 64_000  # of one request

# What pre-tokenizers and normalizers treat in different ways.
PROSE = (
    "It's 12:30; we'll've paid $1,234.50 (7%) for 3 or 1000000 of them -- didn't YOU'RE?",
    "  def f(x):\n\n\treturn x  # a\r\n\n   'b' != \"c\";;\n \n",
    "http://a.b/c_d-e?f=g&h#i @j ~k^l *m* [n] {o} <p> a\\b |q| ... !!!",
    "caf\u00e9 cafe\u0301 \u00dcber \ufb01ne \u2460 \uff21\uff22 \u0130I\u0131 \u1e9e",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u65e5\u672c\u8a9e\u306e \ud55c\uad6d\uc5b4 \u0939\u093f",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u041f\u0440\u0438\u0432\u0435\u0442",
    "\U0001f60a\U0001f469\u200d\U0001f4bb\u2764\ufe0f \u00a0\u2003\u200b\ufeff \u2014 \u2026",
)


def probe_texts(
    spec: dict[str, Any], *, max_bytes: int = MAX_BYTES, piece_bytes: int = PIECE_BYTES
) -> list[str]:
    """Texts of at most about ``piece_bytes``, the most telling ones first.

    Every added token, then what each merge makes, the latest first, then the other pieces, then
    every merge beside the merges nearest in rank that want one of its two parts. Pieces that are
    not UTF-8 are left out. Above ``max_bytes`` the first of these fill two thirds of it, and every
    n-th of the rest the last third; added tokens are always there.

    Args:
        spec: the tokenizer's own JSON (``tokenizer.json``).
    """
    separator = _separator(spec)
    added = [token["content"] for token in spec.get("added_tokens") or ()]
    always = list(dict.fromkeys([*PROSE, *added]))
    others = list(dict.fromkeys(_spelled(spec)))
    chosen = _sample(others, max_bytes - _size(always, separator), separator)
    return _packed([*always, *chosen], separator, piece_bytes)


def _separator(spec: dict[str, Any]) -> str:
    """The shortest control token that leaves the text beside it alone."""
    plain = [
        token["content"]
        for token in spec.get("added_tokens") or ()
        if token["special"] and not (token["lstrip"] or token["rstrip"] or token["normalized"])
    ]
    return min(plain, key=lambda content: (len(content), content), default="\n")


def _spelled(spec: dict[str, Any]) -> Iterator[str]:
    """What `probe_texts` wants beside the added tokens, in its order."""
    kind, model = pieces.kind_of(spec), spec["model"]
    merges = [_pair(merge) for merge in model.get("merges") or ()]
    vocab = model["vocab"]
    names = list(vocab) if isinstance(vocab, dict) else [piece for piece, *_ in vocab]
    made = (left + right for left, right in reversed(merges))
    for name in (*made, *reversed(names), *_overlaps(merges)):
        data = pieces.piece_bytes(name, spec, kind)
        if data and is_utf8(data):
            yield data.decode()


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _overlaps(merges: Sequence[tuple[str, str]]) -> list[str]:
    """The parts of a merge and a third one that a rival joins to them, the latest merges first."""
    found: list[tuple[int, str]] = []
    for order in (range(len(merges)), range(len(merges) - 1, -1, -1)):
        ends: dict[str, int] = {}
        begins: dict[str, int] = {}
        for rank in order:
            left, right = merges[rank]
            if left in ends:
                found.append((rank, merges[ends[left]][0] + left + right))
            if right in begins:
                found.append((rank, left + right + merges[begins[right]][1]))
            ends[right] = begins[left] = rank
    return [text for _, text in sorted(found, reverse=True)]


def _size(texts: Sequence[str], separator: str) -> int:
    return sum(len(text.encode()) for text in texts) + len(separator.encode()) * len(texts)


def _sample(texts: Sequence[str], room: int, separator: str) -> list[str]:
    """All of them; else the first ones in two thirds of ``room`` and every n-th of the others."""
    if _size(texts, separator) <= room:
        return list(texts)
    head, used = 0, 0
    while used < room * 2 // 3:
        used += _size(texts[head : head + 1], separator)
        head += 1
    rest = texts[head:]
    step = -(-_size(rest, separator) // max(room - used, 1))
    return [*texts[:head], *rest[:: max(step, 1)]]


def _packed(texts: Sequence[str], separator: str, piece_bytes: int) -> list[str]:
    found: list[str] = []
    parts: list[str] = []
    size = 0
    for text in texts:
        length = _size([text], separator)
        if parts and size + length > piece_bytes:
            found.append(separator.join(["", *parts, ""]))
            parts, size = [], 0
        parts.append(text)
        size += length
    return [*found, separator.join(["", *parts, ""])]
