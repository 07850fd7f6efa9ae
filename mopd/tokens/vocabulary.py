"""The bytes of every token, and an encoder of raw bytes as a continuation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from mopd.errors import ConfigError
from mopd.tokens import pieces
from mopd.tokens.reading import Method, Reading, offset_ends, string_ends
from mopd.tokens.table import ByteTable
from mopd.tokens.utf8 import canonical, characters, incomplete_utf8_tail, is_utf8, valid_spans

__all__ = ["Vocabulary", "incomplete_utf8_tail"]

# Roles of tokens that frame a text and are no part of it.
FRAMING_ROLES = ("bos", "pad")


class Vocabulary:
    """One tokenizer seen as bytes.

    Only the end-of-turn token has length 0; any other control token that a model emits counts as
    its literal text, so that teachers can read it instead of never seeing it.

    A tokenizer that normalises or drops white space (``exact`` is False) has canonical bytes: what
    its tokens say, which may differ from the text they were made of. Its tokens that begin a word
    have no space before them. As a teacher it reads any text (`read`); as a student it writes the
    canonical bytes of its tokens, words without spaces if it is a WordPiece.

    Args:
        spec: the tokenizer's own JSON (``tokenizer.json``).
        eos_id: the end-of-turn token.
        roles: tokens by role; `FRAMING_ROLES` are never aligned, others have no meaning yet.
    Raises:
        ConfigError: the tokenizer's model cannot spell arbitrary text (WordLevel).
    """

    def __init__(
        self, spec: dict[str, Any], *, eos_id: int, roles: Mapping[str, int] | None = None
    ) -> None:
        self.eos_id = eos_id
        self.kind = pieces.kind_of(spec)
        self.roles = dict(roles or {})
        self._encoder = Tokenizer.from_str(json.dumps(pieces.as_continuation(spec)))
        self._encoder.encode_special_tokens = True
        ids = self._encoder.get_vocab(with_added_tokens=True)
        self.exact = pieces.is_exact(spec, ids)
        self.size = max(ids.values()) + 1
        self.control = np.zeros(self.size, dtype=bool)
        self.token_bytes: tuple[bytes, ...] = self._token_bytes(spec, ids)
        self._unknown = pieces.unknown_id(spec, ids)
        for index in (eos_id, self._unknown):
            if index is not None:
                self.control[index] = True
        self.fingerprint = _fingerprint(spec, eos_id)

    def _token_bytes(self, spec: dict[str, Any], ids: Mapping[str, int]) -> tuple[bytes, ...]:
        added = {token["id"]: token for token in spec.get("added_tokens") or ()}
        found: list[bytes] = [b""] * self.size
        for piece, index in ids.items():
            if index in added:
                self.control[index] = added[index]["special"]
                found[index] = added[index]["content"].encode()
            else:
                found[index] = pieces.piece_bytes(piece, spec, self.kind)
        found[self.eos_id] = b""
        return tuple(found)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, *, eos_token: str | None = None) -> Vocabulary:
        """From a transformers fast tokenizer; ``eos_token`` ends a turn, None: its own does."""
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ConfigError(
                f"{tokenizer.name_or_path}: a fast tokenizer (tokenizer.json) is needed"
            )
        eos_id = tokenizer.eos_token_id
        if eos_token is not None:
            eos_id = tokenizer.get_vocab().get(eos_token)
            if eos_id is None:
                raise ConfigError(
                    f"eos_token={eos_token}: is not one token of {tokenizer.name_or_path}; name "
                    "the token that ends a turn as the tokenizer writes it"
                )
        if eos_id is None:
            raise ConfigError(
                f"{tokenizer.name_or_path}: the tokenizer names no eos_token; set one"
            )
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        named = {"bos": tokenizer.bos_token_id, "pad": tokenizer.pad_token_id}
        roles = {role: int(index) for role, index in named.items() if index is not None}
        return cls(spec, eos_id=int(eos_id), roles=roles)

    @cached_property
    def table(self) -> ByteTable:
        """The bytes of all tokens in one array."""
        return ByteTable.of(self.token_bytes)

    @property
    def lengths(self) -> np.ndarray:
        """[V] int64: bytes of each token."""
        return self.table.lengths[:-1]

    @cached_property
    def unaligned(self) -> np.ndarray:
        """[V + 1] bool, rows of `table`: tokens that frame a text or have no bytes."""
        found = self.table.lengths == 0
        found[[self.roles[role] for role in FRAMING_ROLES if role in self.roles]] = True
        return found

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """Bytes -> token id: the id that the encoder emits for them, else the lowest."""
        table: dict[bytes, int] = {}
        for index, piece in enumerate(self.token_bytes):
            if piece and not self.control[index]:
                table.setdefault(piece, index)
        plain = [p for p in table if is_utf8(p)]
        for piece, ids in zip(plain, self.encode_many(plain), strict=True):
            if len(ids) == 1:
                table[piece] = ids[0]
        return table

    def encode_many(self, segments: Sequence[bytes]) -> list[list[int]]:
        """Token ids of each segment as a continuation.

        A segment that the tokens do not spell byte by byte gives ``[]``.
        """
        plain = [i for i, segment in enumerate(segments) if is_utf8(segment)]
        encodings = self._encoder.encode_batch(
            [segments[i].decode() for i in plain], add_special_tokens=False
        )
        found: dict[int, list[int]] = {i: e.ids for i, e in zip(plain, encodings, strict=True)}
        result = [found[i] if i in found else self._encode_raw(s) for i, s in enumerate(segments)]
        return [
            ids if self._spells(ids, segment) else []
            for ids, segment in zip(result, segments, strict=True)
        ]

    def _spells(self, ids: Sequence[int], segment: bytes) -> bool:
        return self._unknown not in ids and self.decode(ids) == segment

    def encode(self, segment: bytes) -> list[int]:
        """Token ids of one segment; see `encode_many`."""
        return self.encode_many([segment])[0]

    def pre_tokens(self, segment: bytes) -> list[int | None]:
        """Of each token of the encoding, the number of its pre-token; ``[]`` if not UTF-8."""
        return self._encode_text(segment).word_ids if is_utf8(segment) else []

    def _encode_raw(self, data: bytes) -> list[int]:
        """Bytes that are not UTF-8: the valid parts as text, the rest by merges over bytes."""
        ids: list[int] = []
        for part, valid in valid_spans(data):
            found = self._encode_text(part).ids if valid else self._encode_invalid(part)
            if not found and not valid:
                return []
            ids += found
        return ids

    def _encode_text(self, data: bytes) -> Encoding:
        return self._encoder.encode(data.decode(), add_special_tokens=False)

    def _encode_invalid(self, data: bytes) -> list[int]:
        """Byte tokens; ``[]`` when one is missing."""
        if self.kind == "byte_level":
            return [token.id for token in self._encoder.model.tokenize(pieces.to_alphabet(data))]
        found = [self._encoder.token_to_id(f"<0x{b:02X}>") for b in data]
        return [index for index in found if index is not None] if None not in found else []

    def read(self, data: bytes) -> Reading:
        """``data`` as this tokenizer reads it, and where its tokens end in ``data``.

        No ids at all when there are bytes that it has no token for.
        """
        ids = self.encode(data)
        if ids or not data:
            return Reading(ids=ids, byte_ends=self.byte_ends(ids), method="bytes")
        return self._read_by_offsets(data)

    def _read_by_offsets(self, data: bytes) -> Reading:
        ids: list[int] = []
        ends: list[np.ndarray] = []
        begin, method = 0, "offsets"
        for part, valid in valid_spans(data):
            if valid:
                encoding = self._encode_text(part)
                found = encoding.ids
                spelled = self._pieces(found)
                at = offset_ends(part.decode(), encoding.offsets, spelled)
                if at is None:
                    at, method = string_ends(part, spelled), "strings"
            elif self.decode(found := self._encode_invalid(part)) == part:
                at = self.byte_ends(found)
            else:
                return Reading(ids=[], byte_ends=np.zeros(0, dtype=np.int64), method="offsets")
            ids += found
            ends.append(begin + at)
            begin += len(part)
        return Reading(ids=ids, byte_ends=np.concatenate(ends), method=_method(method))

    def locate(self, ids: Sequence[int], data: bytes) -> Reading | None:
        """Where ``ids``, which may come from elsewhere, end in ``data``.

        None when an exact tokenizer would have other ids for it: then they are of another text.
        """
        own = self.read(data)
        if own.ids == list(ids):
            return own
        if self.exact:
            return None
        ends = string_ends(data, self._pieces(ids))
        return Reading(ids=list(ids), byte_ends=ends, method="strings")

    def says(self, ids: Sequence[int], data: bytes) -> bool:
        """Whether the tokens are the canonical text of ``data``: equal but for normalisation."""
        if self._unknown in ids:
            return False
        if (spelled := self.decode(ids)) == data:
            return True
        text, wanted = characters(data), canonical(characters(spelled))
        if canonical(text) == wanted:
            return True
        normalizer = self._encoder.normalizer
        if normalizer is None or not is_utf8(data):
            return False
        return canonical(normalizer.normalize_str(text).replace(pieces.METASPACE, " ")) == wanted

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The exact bytes; the end of turn has none."""
        return b"".join(self._pieces(ids))

    def _pieces(self, ids: Sequence[int] | np.ndarray) -> list[bytes]:
        return [self.token_bytes[i] if i < self.size else b"" for i in ids]

    def byte_ends(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """[S] int64: bytes of the tokens up to and with each."""
        return self.table.ends(self.table.rows(ids))


def _method(name: str) -> Method:
    return "strings" if name == "strings" else "offsets"


def _fingerprint(spec: dict[str, Any], eos_id: int) -> str:
    keys = ("model", "added_tokens", "normalizer", "pre_tokenizer")
    text = json.dumps([[spec.get(k) for k in keys], eos_id], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
