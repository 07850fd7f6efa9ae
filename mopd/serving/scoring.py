"""The request of the scoring endpoint, and what every server of it shares. No torch."""

from __future__ import annotations

import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mopd.errors import ConfigError
from mopd.serving.address import is_loopback
from mopd.serving.wire import RawRows, Wire, WireHeader

SCORE_PATH = "/mopd/v1/score"
MODEL_PATH = "/mopd/v1/model"
MAX_BODY_BYTES = 32 << 20


class RequestError(ValueError):
    """A request that no server can answer; ``status`` is HTTP's."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message, status)
        self.message = message
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSequence:
    """Rows for ``ids[start:]``: row t predicts ``ids[start + t]``."""

    ids: np.ndarray  # [L] int32, prompt and response
    start: int  # 1 <= start <= L


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """``top_k`` None: the whole vocabulary. ``vocab_size``: columns behind it are padding."""

    request: str
    sequences: tuple[ScoredSequence, ...]
    top_k: int | None
    temperature: float
    vocab_size: int
    wire: Wire

    @property
    def width(self) -> int:
        """Entries of a row."""
        return self.vocab_size if self.top_k is None else self.top_k

    def row_counts(self) -> tuple[int, ...]:
        """Rows of each sequence."""
        return tuple(len(sequence.ids) - sequence.start for sequence in self.sequences)

    def header(self, *, model: str) -> WireHeader:
        """Header of the answer."""
        return WireHeader(
            request=self.request,
            model=model,
            wire=self.wire,
            listed=self.top_k is not None,
            top_k=self.width,
            temperature=self.temperature,
            rows=self.row_counts(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreLimits:
    """What one engine can do."""

    vocab_size: int  # columns of its logits
    max_length: int  # tokens of one sequence
    max_sequences: int = 512  # of one request
    max_rows_bytes: int = 1 << 30  # of one answer


class Scorer(Protocol):
    """An engine behind the endpoint."""

    fingerprint: str
    limits: ScoreLimits

    def score(self, request: ScoreRequest) -> RawRows: ...


def read_request(body: bytes, *, limits: ScoreLimits) -> ScoreRequest:
    """The request in ``body``. Unknown fields are refused; a larger top-k is cut to the vocabulary.

    Raises:
        RequestError: malformed, or beyond ``limits``.
    """
    try:
        fields: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError("the body is no JSON") from error
    wanted = {"request", "sequences", "top_k", "temperature", "vocab_size", "wire"}
    if not isinstance(fields, dict) or fields.keys() != wanted:
        raise RequestError(f"the fields are {', '.join(sorted(wanted))}, all of them")
    name, temperature = fields["request"], fields["temperature"]
    if not isinstance(name, str) or len(name) > 128 or not name.isascii():
        raise RequestError("request: up to 128 ASCII characters")
    if type(temperature) not in (int, float) or not 1e-3 <= temperature <= 1e3:
        raise RequestError("temperature: between 0.001 and 1000")
    if fields["wire"] not in ("fp32", "fp16"):
        raise RequestError("wire: fp32 or fp16")
    vocab_size = _integer(fields["vocab_size"], "vocab_size", 1, limits.vocab_size)
    top_k = fields["top_k"]
    if top_k is not None:
        top_k = min(_integer(top_k, "top_k", 1, 1 << 20), vocab_size)
    sequences = fields["sequences"]
    if not isinstance(sequences, list) or not 1 <= len(sequences) <= limits.max_sequences:
        raise RequestError(f"sequences: a list of 1 to {limits.max_sequences}")
    request = ScoreRequest(
        request=name,
        sequences=tuple(
            _sequence(entry, number, vocab_size=vocab_size, max_length=limits.max_length)
            for number, entry in enumerate(sequences)
        ),
        top_k=top_k,
        temperature=float(temperature),
        vocab_size=vocab_size,
        wire=fields["wire"],
    )
    size = request.header(model="").body_bytes()
    if size > limits.max_rows_bytes:
        raise RequestError(
            f"an answer of {size} bytes, over {limits.max_rows_bytes}: send fewer sequences",
            status=413,
        )
    return request


def _sequence(entry: Any, number: int, *, vocab_size: int, max_length: int) -> ScoredSequence:
    name = f"sequences[{number}]"
    if not isinstance(entry, dict) or entry.keys() != {"ids", "start"}:
        raise RequestError(f"{name}: an object of ids and start")
    ids = entry["ids"]
    if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
        raise RequestError(f"{name}.ids: a list of integers")
    if not 1 <= len(ids) <= max_length:
        raise RequestError(f"{name}.ids: {len(ids)} tokens; the engine takes 1 to {max_length}")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise RequestError(f"{name}.ids: ids are 0 to {vocab_size - 1}")
    start = _integer(entry["start"], f"{name}.start", 1, len(ids))
    return ScoredSequence(ids=np.asarray(ids, dtype=np.int32), start=start)


def _integer(value: Any, name: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise RequestError(f"{name}: an integer from {low} to {high}")
    return value


def is_authorised(header: str | None, *, token: str | None) -> bool:
    """Whether an Authorization header carries ``token``, compared in constant time."""
    if token is None:
        return True
    given = (header or "").encode("utf-8", "surrogateescape")
    return hmac.compare_digest(given, f"Bearer {token}".encode())


def check_exposure(host: str, *, token: str | None) -> None:
    """Refuses an open door.

    Raises:
        ConfigError: not loopback and no token, or a token that is too short to keep anyone out.
    """
    if token is not None and len(token) < 16:
        raise ConfigError("the token has less than 16 characters; make one with `openssl rand`")
    if token is None and not is_loopback(host):
        raise ConfigError(f"host {host} is not loopback: name a token's variable with --token-env")


def join_rows(parts: Sequence[RawRows]) -> RawRows:
    """Rows of several sequences or blocks as one; at least one part."""
    listed = [part.topk_ids for part in parts if part.topk_ids is not None]
    return RawRows(
        topk_ids=np.concatenate(listed) if len(listed) == len(parts) else None,
        **{
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("topk_logprobs", "logprobs", "log_tail", "lse")
        },
    )
