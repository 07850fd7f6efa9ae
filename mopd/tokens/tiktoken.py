"""Vocabularies from a ``*.tiktoken`` file: one base64 token and its rank per line.

The ranks are merges of a byte-level BPE in disguise: any two neighbours whose bytes together are a
token may merge, the lowest rank first. Written out as a ``tokenizer.json`` they need no encoder of
their own.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mopd.errors import ConfigError
from mopd.tokens.pieces import to_alphabet
from mopd.tokens.vocabulary import Vocabulary


def load_tiktoken(
    path: str | Path,
    *,
    pattern: str,
    special_tokens: Mapping[str, int],
    eos: str,
    roles: Mapping[str, int] | None = None,
) -> Vocabulary:
    """A vocabulary with the ids of the file.

    Args:
        pattern: the regular expression whose matches are the words that no merge crosses; the file
            does not hold it.
        special_tokens: text -> id of the control tokens; ``eos`` is the end of turn among them.
    Raises:
        ConfigError: the file is not of this kind, or ids clash.
    """
    ranks = read_ranks(Path(path))
    if eos not in special_tokens:
        raise ConfigError(f"{path}: {eos!r} is none of the special tokens; name its id")
    taken = set(ranks.values()) & set(special_tokens.values())
    if taken or len(set(special_tokens.values())) != len(special_tokens):
        raise ConfigError(f"{path}: special tokens share ids with other tokens: {sorted(taken)}")
    spec = tokenizer_spec(ranks, pattern=pattern, special_tokens=special_tokens)
    return Vocabulary(spec, eos_id=special_tokens[eos], roles=roles)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank, which is the token's id.

    Raises:
        ConfigError: a line that is no token and rank, a repeated one, or a byte without a token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ConfigError(f"{path}:{number}: wanted a base64 token and its rank") from error
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing or len(set(ranks.values())) != len(ranks):
        raise ConfigError(
            f"{path}: not the ranks of a byte-level BPE ({len(missing)} bytes have no token, "
            f"{len(ranks) - len(set(ranks.values()))} ranks are repeated)"
        )
    return ranks


def tokenizer_spec(
    ranks: Mapping[bytes, int], *, pattern: str, special_tokens: Mapping[str, int]
) -> dict[str, Any]:
    """The ``tokenizer.json`` of the ranks.

    Special tokens may stand anywhere between and behind the ranks, with holes, where ``tokenizers``
    would number them itself. The model holds their ids under names that no text can spell: with a
    space, which byte-level pieces never have.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    words = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    steps = [words | {"invert": False}, byte_level | {"use_regex": False}]
    return {
        "version": "1.0",
        "added_tokens": [_special(text, index) for text, index in special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": False},
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a word that is a token needs no merges
            "vocab": {to_alphabet(token): rank for token, rank in ranks.items()}
            | {f" {text}": index for text, index in special_tokens.items()},
            "merges": _merges(ranks),
        },
    }


def _merges(ranks: Mapping[bytes, int]) -> list[list[str]]:
    """Every way to make a token of two others, by the rank of what they make."""
    found: list[list[str]] = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        found += [
            [to_alphabet(left), to_alphabet(right)]
            for left, right in halves
            if left in ranks and right in ranks
        ]
    return found


def _special(text: str, index: int) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, "special": True, **plain}
