"""Scored rows as bytes: one JSON header, then raw little-endian arrays. numpy and nothing else.

Layout: 8 bytes magic, 4 bytes header length, the header (JSON, padded with spaces to a multiple of
8), then the arrays of all sequences one behind another: top-k ids (int32, absent when the whole
vocabulary is sent), top-k log-probabilities, log-probability of the actual token, log of the mass
outside the top-k, log-sum-exp at 1 and at the temperature. A row at K = 64 is 528 bytes.

With ``wire="fp16"`` the top-k log-probabilities alone are half precision: their error is at most
2**-11 of their value (0.004 at -8) or 2**-25, a row is 400 bytes. Finite values stay finite.

Shapes: N rows of all sequences, K listed tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from mopd.errors import TeacherError

MAGIC = b"MOPDROW1"
MAX_HEADER_BYTES = 1 << 20
CONTENT_TYPE = "application/vnd.mopd.rows"
LOWEST_HALF = -65504.0
ALIGNMENT = 8

Wire = Literal["fp32", "fp16"]
_TOP_TYPE = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2")}
_FIELDS = {"request", "model", "wire", "listed", "top_k", "temperature", "rows"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRows:
    """What an engine tells of N predicted tokens, before anyone checks it."""

    topk_ids: np.ndarray | None  # [N, K] int32; None: the whole vocabulary, K = its width
    topk_logprobs: np.ndarray  # [N, K] float32
    logprobs: np.ndarray  # [N] float32, of the actual token
    log_tail: np.ndarray  # [N] float32, log of the mass outside the top-k
    lse: np.ndarray  # [N, 2] float32: log-sum-exp of the logits at 1 and at the temperature


@dataclass(frozen=True, slots=True, kw_only=True)
class WireHeader:
    """Which request of which model the rows answer; ``rows`` counts them per sequence."""

    request: str
    model: str  # fingerprint
    wire: Wire
    listed: bool  # the top-k ids are in the body
    top_k: int
    temperature: float
    rows: tuple[int, ...]

    def body_bytes(self) -> int:
        """Exact size of the arrays."""
        per_row = self.top_k * (_TOP_TYPE[self.wire].itemsize + 4 * self.listed) + 16
        return sum(self.rows) * per_row


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A decoded message."""

    header: WireHeader
    rows: RawRows

    def per_sequence(self) -> Iterator[RawRows]:
        """The rows of each sequence, as views."""
        end = 0
        for count in self.header.rows:
            begin, end = end, end + count
            ids = self.rows.topk_ids
            yield RawRows(
                topk_ids=None if ids is None else ids[begin:end],
                topk_logprobs=self.rows.topk_logprobs[begin:end],
                logprobs=self.rows.logprobs[begin:end],
                log_tail=self.rows.log_tail[begin:end],
                lse=self.rows.lse[begin:end],
            )


def encode_header(header: WireHeader) -> bytes:
    """Everything before the arrays."""
    fields = {name: getattr(header, name) for name in sorted(_FIELDS)}
    text = json.dumps(fields, separators=(",", ":"), allow_nan=False).encode("ascii")
    start = len(MAGIC) + 4
    text += b" " * (-(start + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(text)} bytes: ask for fewer sequences at once")
    return MAGIC + len(text).to_bytes(4, "little") + text


def encode_rows(rows: RawRows, *, wire: Wire) -> bytes:
    """The arrays, in the order of the layout."""
    top = rows.topk_logprobs
    if wire == "fp16":
        top = np.where(np.isneginf(top), top, np.maximum(top, LOWEST_HALF))
    parts = [] if rows.topk_ids is None else [rows.topk_ids.astype("<i4", copy=False)]
    parts.append(top.astype(_TOP_TYPE[wire], copy=False))
    parts += [a.astype("<f4", copy=False) for a in (rows.logprobs, rows.log_tail, rows.lse)]
    return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


def encode(header: WireHeader, rows: RawRows) -> bytes:
    """A whole message."""
    body = encode_rows(rows, wire=header.wire)
    if len(body) != header.body_bytes():
        raise ValueError(f"{len(body)} bytes of rows, the header tells of {header.body_bytes()}")
    return encode_header(header) + body


def decode(data: bytes, *, max_bytes: int) -> Reply:
    """The message in ``data``; arrays are read-only views unless the type on the wire is another.

    The sizes are checked, the numbers are not: that is the admission contract's part.

    Raises:
        TeacherError: over ``max_bytes``, another format, or not exactly as long as it says.
    """
    if len(data) > max_bytes:
        raise TeacherError(f"a reply of {len(data)} bytes, over the limit of {max_bytes}")
    start = len(MAGIC) + 4
    if len(data) < start or not data.startswith(MAGIC):
        raise TeacherError("a reply that is not in mopd's wire format, or of another version")
    length = int.from_bytes(data[len(MAGIC) : start], "little")
    if length > MAX_HEADER_BYTES or (start + length) % ALIGNMENT or start + length > len(data):
        raise TeacherError(f"a header of {length} bytes in a reply of {len(data)}")
    header = _read_header(data[start : start + length])
    expected = start + length + header.body_bytes()
    if len(data) != expected:
        raise TeacherError(f"a reply of {len(data)} bytes that tells of {expected}")
    return Reply(header=header, rows=_read_rows(data, header, offset=start + length))


def _read_rows(data: bytes, header: WireHeader, *, offset: int) -> RawRows:
    count = sum(header.rows)

    def take(dtype: str | np.dtype, *shape: int) -> np.ndarray:
        nonlocal offset
        array = np.frombuffer(data, dtype=dtype, count=int(np.prod(shape)), offset=offset)
        offset += array.nbytes
        return array.reshape(shape)

    ids = take("<i4", count, header.top_k) if header.listed else None
    top = take(_TOP_TYPE[header.wire], count, header.top_k)
    return RawRows(
        topk_ids=ids,
        topk_logprobs=top.astype(np.float32, copy=False),
        logprobs=take("<f4", count),
        log_tail=take("<f4", count),
        lse=take("<f4", count, 2),
    )


def _read_header(text: bytes) -> WireHeader:
    try:
        fields: Any = json.loads(text.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise TeacherError(f"a header that is no JSON ({type(error).__name__})") from error
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        raise TeacherError("a header with other fields")
    rows = fields["rows"]
    in_order = (
        isinstance(fields["request"], str)
        and isinstance(fields["model"], str)
        and isinstance(fields["wire"], str)
        and fields["wire"] in get_args(Wire)
        and isinstance(fields["listed"], bool)
        and _is_count(fields["top_k"])
        and isinstance(fields["temperature"], float)
        and 0 < fields["temperature"] < float("inf")
        and isinstance(rows, list)
        and all(map(_is_count, rows))
    )
    if not in_order:
        raise TeacherError("a header with a field of another type or range")
    return WireHeader(**{**fields, "rows": tuple(rows)})


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 31
