"""The bytes of every token, and an encoder of raw bytes as a continuation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mopd.errors import ConfigError

METASPACE = "\u2581"


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE uses for the 256 bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in plain}
    shifted = (b for b in range(256) if b not in set(plain))
    table.update({chr(256 + n): b for n, b in enumerate(shifted)})
    return table


_CHAR_TO_BYTE = _byte_alphabet()
_BYTE_TO_CHAR = {b: c for c, b in _CHAR_TO_BYTE.items()}


def _parts(node: Any) -> Iterator[dict[str, Any]]:
    """Every component of a (possibly nested) pre-tokenizer, decoder or normalizer."""
    if isinstance(node, dict):
        yield node
        for key in ("pretokenizers", "decoders", "normalizers"):
            for child in node.get(key) or ():
                yield from _parts(child)


def _without_dummy_prefix(spec: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer as an encoder of a CONTINUATION: no prefix space, no template."""
    spec = json.loads(json.dumps(spec))
    for part in _parts(spec.get("pre_tokenizer")):
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
    return spec


def _valid_spans(data: bytes) -> Iterator[tuple[bytes, bool]]:
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


class Vocabulary:
    """One tokenizer seen as bytes.

    Only the end-of-turn token has length 0; any other control token that a model emits counts as
    its literal text, so that teachers can judge it instead of never seeing it.

    Args:
        spec: the tokenizer's own JSON (``tokenizer.json``).
        eos_id: the end-of-turn token.
    Raises:
        ConfigError: the tokenizer is neither byte-level nor SentencePiece-style with bytes.
    """

    def __init__(self, spec: dict[str, Any], *, eos_id: int) -> None:
        self.eos_id = eos_id
        self.kind = _kind(spec)
        self._encoder = Tokenizer.from_str(json.dumps(_without_dummy_prefix(spec)))
        self._encoder.encode_special_tokens = True
        added = {token["id"]: token for token in spec.get("added_tokens") or ()}
        ids = self._encoder.get_vocab(with_added_tokens=True)
        self.size = max(ids.values()) + 1
        self.control = np.zeros(self.size, dtype=bool)
        pieces: list[bytes] = [b""] * self.size
        for piece, index in ids.items():
            if index in added:
                self.control[index] = added[index]["special"]
                pieces[index] = added[index]["content"].encode()
            else:
                pieces[index] = self._piece_bytes(piece)
        pieces[eos_id] = b""
        self.control[eos_id] = True
        self.token_bytes: tuple[bytes, ...] = tuple(pieces)
        self.lengths = np.fromiter(map(len, pieces), dtype=np.int64, count=self.size)
        self.fingerprint = _fingerprint(spec, eos_id)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> Vocabulary:
        """From a transformers fast tokenizer with an end-of-turn token."""
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ConfigError(
                f"{tokenizer.name_or_path}: a fast tokenizer (tokenizer.json) is needed"
            )
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"{tokenizer.name_or_path}: the tokenizer names no eos_token; set one"
            )
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        return cls(spec, eos_id=int(tokenizer.eos_token_id))

    def _piece_bytes(self, piece: str) -> bytes:
        if self.kind == "byte_level":
            if all(c in _CHAR_TO_BYTE for c in piece):
                return bytes(_CHAR_TO_BYTE[c] for c in piece)
            return piece.encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(METASPACE, " ").encode()

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """Bytes -> token id: the id that the encoder emits for them, else the lowest."""
        table: dict[bytes, int] = {}
        for index, piece in enumerate(self.token_bytes):
            if piece and not self.control[index]:
                table.setdefault(piece, index)
        pieces = [p for p in table if _is_utf8(p)]
        for piece, ids in zip(pieces, self.encode_many(pieces), strict=True):
            if len(ids) == 1:
                table[piece] = ids[0]
        return table

    def encode_many(self, segments: Sequence[bytes]) -> list[list[int]]:
        """Token ids of each segment as a continuation. Bytes that no token covers give ``[]``."""
        plain = [i for i, segment in enumerate(segments) if _is_utf8(segment)]
        encodings = self._encoder.encode_batch(
            [segments[i].decode() for i in plain], add_special_tokens=False
        )
        found: dict[int, list[int]] = {i: e.ids for i, e in zip(plain, encodings, strict=True)}
        result = [found[i] if i in found else self._encode_raw(s) for i, s in enumerate(segments)]
        return [
            ids if self.decode(ids) == segment else []
            for ids, segment in zip(result, segments, strict=True)
        ]

    def encode(self, segment: bytes) -> list[int]:
        """Token ids of one segment; see `encode_many`."""
        return self.encode_many([segment])[0]

    def _encode_raw(self, data: bytes) -> list[int]:
        """Bytes that are not UTF-8: the valid parts as text, the rest by merges over bytes."""
        ids: list[int] = []
        for part, valid in _valid_spans(data):
            if valid:
                ids += self._encoder.encode(part.decode(), add_special_tokens=False).ids
            elif self.kind == "byte_level":
                mapped = "".join(_BYTE_TO_CHAR[b] for b in part)
                ids += [token.id for token in self._encoder.model.tokenize(mapped)]
            else:
                found = [self._encoder.token_to_id(f"<0x{b:02X}>") for b in part]
                byte_ids = [index for index in found if index is not None]
                if len(byte_ids) != len(part):
                    return []
                ids += byte_ids
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The exact bytes; the end of turn has none."""
        return b"".join(self.token_bytes[i] if i < self.size else b"" for i in ids)

    def byte_ends(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """[S] int64: bytes consumed after each token."""
        index = np.asarray(ids, dtype=np.int64)
        return np.cumsum(np.where(index < self.size, self.lengths[index % self.size], 0))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _kind(spec: dict[str, Any]) -> str:
    parts = [*_parts(spec.get("pre_tokenizer")), *_parts(spec.get("decoder"))]
    types = {part["type"] for part in parts}
    if "ByteLevel" in types:
        return "byte_level"
    if "Metaspace" in types or "ByteFallback" in types or spec["model"].get("byte_fallback"):
        return "sentencepiece"
    raise ConfigError(
        f"tokenizer of kind {spec['model']['type']} with {sorted(types)} is not supported; "
        "use a byte-level BPE or a SentencePiece-style tokenizer with byte fallback"
    )


def _fingerprint(spec: dict[str, Any], eos_id: int) -> str:
    keys = ("model", "added_tokens", "normalizer", "pre_tokenizer")
    text = json.dumps([[spec.get(k) for k in keys], eos_id], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
