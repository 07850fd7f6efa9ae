"""What a ``tokenizer.json`` says about bytes: its kind, the bytes of a piece, a continuation."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from typing import Any

from mopd.errors import ConfigError

METASPACE = "\u2581"
MODELS = ("BPE", "Unigram", "WordPiece")

# Components that hand every byte on; any other may change or drop some.
_FAITHFUL = {
    "ByteLevel",
    "Metaspace",
    "Split",
    "Digits",
    "Punctuation",
    "UnicodeScripts",
    "FixedLength",
    "Prepend",
    "Sequence",
}
_ISOLATING = {"Split", "Punctuation", "Sequence"}  # faithful unless they remove what they match


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE uses for the 256 bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in plain}
    shifted = (b for b in range(256) if b not in set(plain))
    table.update({chr(256 + n): b for n, b in enumerate(shifted)})
    return table


_CHAR_TO_BYTE = _byte_alphabet()
_BYTE_TO_CHAR = {b: c for c, b in _CHAR_TO_BYTE.items()}


def to_alphabet(data: bytes) -> str:
    """Bytes as byte-level BPE writes them in its vocabulary."""
    return "".join(_BYTE_TO_CHAR[b] for b in data)


def parts(node: Any) -> Iterator[dict[str, Any]]:
    """Every component of a (possibly nested) pre-tokenizer, decoder or normalizer."""
    if isinstance(node, dict):
        yield node
        for key in ("pretokenizers", "decoders", "normalizers"):
            for child in node.get(key) or ():
                yield from parts(child)


def kind_of(spec: dict[str, Any]) -> str:
    """``byte_level``, ``sentencepiece`` (a mark for the space), ``wordpiece`` or ``plain``.

    Raises:
        ConfigError: a model whose tokens are whole words or unknown.
    """
    model = spec["model"]["type"]
    if model not in MODELS:
        raise ConfigError(
            f"tokenizer of kind {model} is not supported: its tokens do not spell every text; "
            f"use a tokenizer whose model is one of {', '.join(MODELS)}"
        )
    found = [*parts(spec.get("pre_tokenizer")), *parts(spec.get("decoder"))]
    if any(part["type"] == "ByteLevel" for part in found):
        return "byte_level"
    if model == "WordPiece":
        return "wordpiece"
    marks = any(_marks_spaces(part) for part in [*found, *parts(spec.get("normalizer"))])
    return "sentencepiece" if marks or byte_fallback(spec) else "plain"


def byte_fallback(spec: dict[str, Any]) -> bool:
    """Whether any byte can be written as ``<0xHH>``."""
    decoders = {part["type"] for part in parts(spec.get("decoder"))}
    return "ByteFallback" in decoders or bool(spec["model"].get("byte_fallback"))


def is_exact(spec: dict[str, Any], pieces: Container[str]) -> bool:
    """Whether the tokens of a text spell its bytes: nothing normalises, drops or gives up.

    ``pieces`` is the vocabulary. A tokenizer of which this cannot be told counts as inexact.
    """
    if kind_of(spec) == "byte_level":
        every = list(_CHAR_TO_BYTE)
    elif byte_fallback(spec):
        every = [f"<0x{b:02X}>" for b in range(256)]
    else:
        return False
    strips = any(t["lstrip"] or t["rstrip"] for t in spec.get("added_tokens") or ())
    found = [*parts(spec.get("normalizer")), *parts(spec.get("pre_tokenizer"))]
    known = all(piece in pieces for piece in every)
    return known and not strips and all(map(_is_faithful, found))


def _is_faithful(part: dict[str, Any]) -> bool:
    if part["type"] == "Replace":  # SentencePiece's mark stands for the space, nothing is lost
        return _marks_spaces(part) and part["pattern"].get("String") == " "
    removes = part["type"] in _ISOLATING and part.get("behavior") == "Removed"
    return part["type"] in _FAITHFUL and not removes


def _marks_spaces(part: dict[str, Any]) -> bool:
    return part["type"] == "Metaspace" or METASPACE in str(part.get("content", ""))


def piece_bytes(piece: str, spec: dict[str, Any], kind: str) -> bytes:
    """The canonical bytes of one entry of the vocabulary.

    The ``##`` of WordPiece says "inside a word" and is no text; neither is a ``</w>``. A piece
    that begins a word has NO space before it: such a tokenizer drops the spaces, and its piece
    ``hello`` means the same bytes at the start of a text as behind a space.
    """
    model = spec["model"]
    if prefix := model.get("continuing_subword_prefix"):
        piece = piece.removeprefix(prefix)
    if suffix := model.get("end_of_word_suffix"):
        piece = piece.removesuffix(suffix)
    if kind == "byte_level":
        if all(c in _CHAR_TO_BYTE for c in piece):
            return bytes(_CHAR_TO_BYTE[c] for c in piece)
        return piece.encode()
    if kind != "sentencepiece":
        return piece.encode()
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(METASPACE, " ").encode()


def unknown_id(spec: dict[str, Any], ids: dict[str, int]) -> int | None:
    """The token that stands for text which the vocabulary cannot spell."""
    model = spec["model"]
    if model.get("unk_id") is not None:  # Unigram counts
        return int(model["unk_id"])
    return ids.get(model.get("unk_token") or "")


def as_continuation(spec: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer as an encoder of a CONTINUATION: no prefix space, no template.

    An added token whose id the model has under another name (mopd/tokens/tiktoken.py) is one that
    no text may become: the encoder does not learn of it.
    """
    spec = json.loads(json.dumps(spec))
    for part in parts(spec.get("pre_tokenizer")):
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
        elif part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
    normalizer = spec.get("normalizer")
    if normalizer and normalizer["type"] == "Prepend":
        spec["normalizer"] = None
    elif normalizer and normalizer["type"] == "Sequence":
        kept = [n for n in normalizer["normalizers"] if n["type"] != "Prepend"]
        spec["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    spec["post_processor"] = None
    spec["truncation"] = spec["padding"] = None
    if isinstance(vocab := spec["model"]["vocab"], dict):
        taken = set(vocab.values())
        spec["added_tokens"] = [
            token
            for token in spec.get("added_tokens") or ()
            if token["id"] not in taken or vocab.get(token["content"]) == token["id"]
        ]
    return spec
