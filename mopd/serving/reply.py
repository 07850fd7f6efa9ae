"""Servers' JSON of prompt log-probabilities -> flat arrays. Whether to believe them comes later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import msgspec
import numpy as np

from mopd.serving.scoring import ScoredSequence
from mopd.serving.wire import RawRows

# Ids of entries that are no token: strings that several tokens have, and strings that none has.
AMBIGUOUS, UNKNOWN = -2, -3


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """One prompt's listed tokens, position by position. T tokens were read, the first unpredicted.

    ``logprobs`` is NaN where the server had null; a position without a list has ``count`` 0.
    """

    count: np.ndarray  # [T] int64
    ids: np.ndarray  # [sum(count)] int64
    logprobs: np.ndarray  # [sum(count)] float64
    echoed: np.ndarray | None = None  # [T] int64: the ids as the server read them


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayRows:
    """One sequence's rows from its start on, as `mopd serve` sends them.

    Args:
        error: of the listed log-probabilities on the wire, relative to their size.
    """

    rows: RawRows
    temperature: float  # of the second log-sum-exp
    error: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A whole reply: ``prompts`` in the order of the request."""

    model: str | None
    prompts: Sequence[Entries | ArrayRows]


class _Entry(msgspec.Struct, gc=False):
    logprob: float | None


class _VllmChoice(msgspec.Struct, gc=False):
    index: int
    prompt_logprobs: list[dict[int, _Entry] | None]
    prompt_token_ids: list[int] | None = None


class _VllmReply(msgspec.Struct, gc=False):
    choices: list[_VllmChoice]
    model: str | None = None


class _GenerateReply(msgspec.Struct, gc=False):
    prompt_logprobs: list[dict[int, _Entry] | None]
    prompt_token_ids: list[int] | None = None
    model: str | None = None


class _OpenAiLogprobs(msgspec.Struct, gc=False):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]


class _OpenAiChoice(msgspec.Struct, gc=False):
    index: int
    logprobs: _OpenAiLogprobs


class _OpenAiReply(msgspec.Struct, gc=False):
    choices: list[_OpenAiChoice]
    model: str | None = None


class _SglangMeta(msgspec.Struct, gc=False):
    input_token_logprobs: list[tuple[float | None, int, str | None]]
    input_top_logprobs: list[list[tuple[float | None, int, str | None]] | None]


class _SglangReply(msgspec.Struct, gc=False):
    meta_info: _SglangMeta


class _TrlReply(msgspec.Struct, gc=False):
    logprobs_b64: bytes
    token_ids_b64: bytes
    actual_logprobs_b64: bytes
    actual_token_ids_b64: bytes
    shape: tuple[int, int, int]
    completion_lengths: list[int]


T = TypeVar("T")
Choice = TypeVar("Choice", _VllmChoice, _OpenAiChoice)

_VLLM = msgspec.json.Decoder(_VllmReply)
_GENERATE = msgspec.json.Decoder(_GenerateReply)
_OPENAI = msgspec.json.Decoder(_OpenAiReply)
_SGLANG = msgspec.json.Decoder(list[_SglangReply])
_TRL = msgspec.json.Decoder(_TrlReply)


def decode_vllm(body: bytes, num_prompts: int) -> Reply:
    """vLLM's ``prompt_logprobs``: ``[null, {"<id>": {"logprob": ...}, ...}, ...]``.

    Raises:
        ValueError: not JSON of this shape, or not one choice for each prompt.
    """
    reply = _decode(_VLLM, body)
    return Reply(
        model=reply.model,
        prompts=[_vllm_entries(c) for c in _in_order(reply.choices, num_prompts)],
    )


def decode_generate(body: bytes) -> Reply:
    """vLLM's ``/inference/v1/generate``: the same lists, of the only sequence of the request.

    Raises:
        ValueError: not JSON of this shape.
    """
    reply = _decode(_GENERATE, body)
    return Reply(model=reply.model, prompts=[_vllm_entries(reply)])


def _vllm_entries(choice: _VllmChoice | _GenerateReply) -> Entries:
    positions = [position or {} for position in choice.prompt_logprobs]
    count = np.fromiter(map(len, positions), dtype=np.int64, count=len(positions))
    total = int(count.sum())
    listed = [entry.logprob for position in positions for entry in position.values()]
    try:
        logprobs = np.fromiter(listed, dtype=np.float64, count=total)
    except TypeError:  # a null, rare
        logprobs = np.array(listed, dtype=np.float64)
    return Entries(
        count=count,
        ids=_ids(chain.from_iterable(positions), total),
        logprobs=logprobs,
        echoed=None if choice.prompt_token_ids is None else _ids(choice.prompt_token_ids, -1),
    )


def decode_openai(body: bytes, num_prompts: int, *, names: Mapping[str, int]) -> Reply:
    """The ``echo=true`` shape of ``/v1/completions``, whose tokens are strings.

    Args:
        names: string -> id (`token_names`); ``token_id:<n>`` is understood without it.
    Raises:
        ValueError: not JSON of this shape, or not one choice for each prompt.
    """
    reply = _decode(_OPENAI, body)
    return Reply(
        model=reply.model,
        prompts=[_openai_entries(c.logprobs, names) for c in _in_order(reply.choices, num_prompts)],
    )


def _openai_entries(said: _OpenAiLogprobs, names: Mapping[str, int]) -> Entries:
    if not len(said.tokens) == len(said.token_logprobs) == len(said.top_logprobs):
        raise ValueError("tokens, token_logprobs and top_logprobs differ in length")
    positions: list[list[tuple[int, float | None]]] = []
    for token, value, top in zip(said.tokens, said.token_logprobs, said.top_logprobs, strict=True):
        listed = dict(top) if top else {}
        if top is not None:
            listed.setdefault(token, value)
        positions.append([(_named(text, names), v) for text, v in listed.items()])
    echoed = np.array([_named(token, names) for token in said.tokens], dtype=np.int64)
    return _from_lists(positions, echoed)


def _named(text: str, names: Mapping[str, int]) -> int:
    if text.startswith("token_id:"):
        number = text.removeprefix("token_id:")
        return int(number) if number.isdecimal() and len(number) < 10 else UNKNOWN
    if "\ufffd" in text:
        return AMBIGUOUS
    return names.get(text, UNKNOWN)


def decode_sglang(body: bytes, sequences: Sequence[ScoredSequence]) -> Reply:
    """SGLang's ``/generate`` with ``input_top_logprobs``: triples of log-probability, id, text.

    Positions begin one before each sequence's start. Some versions write the vocabulary's last id
    as 0 among the actual tokens, so a 0 there says nothing of what was read.

    Raises:
        ValueError: not JSON of this shape, or not one reply for each sequence.
    """
    replies = _decode(_SGLANG, body if body.lstrip()[:1] == b"[" else b"[" + body + b"]")
    if len(replies) != len(sequences):
        raise ValueError(f"{len(replies)} replies for {len(sequences)} sequences")
    return Reply(
        model=None,
        prompts=[
            _sglang_entries(reply.meta_info, sequence)
            for reply, sequence in zip(replies, sequences, strict=True)
        ],
    )


def _sglang_entries(meta: _SglangMeta, sequence: ScoredSequence) -> Entries:
    actual, top, first = meta.input_token_logprobs, meta.input_top_logprobs, sequence.start - 1
    sent = sequence.ids.tolist()
    if not len(actual) == len(top) == len(sent) - first:
        raise ValueError(f"{len(actual)} tokens and {len(top)} lists for {len(sent) - first}")
    positions: list[list[tuple[int, float | None]]] = [[] for _ in range(first)]
    for (value, said, _), listed, own in zip(actual, top, sent[first:], strict=True):
        found = [(index, entry) for entry, index, _ in listed or ()]
        token = said or own
        if found and token not in {index for index, _ in found}:
            found.append((token, value))
        positions.append(found)
    echoed = [UNKNOWN] * first + [said or UNKNOWN for _, said, _ in actual]
    return _from_lists(positions, _ids(echoed, -1))


def decode_trl(body: bytes, sequences: Sequence[ScoredSequence], *, k: int) -> Reply:
    """``trl vllm-serve``'s binary shape: float32 and int32 in base64, [B, L, K] of the top-k and
    [B, L, 1] of the actual tokens. What it does not know is -inf with id 0.

    Raises:
        ValueError: not JSON of this shape, or of other sizes than those of the request.
    """
    reply = _decode(_TRL, body)
    lengths = [len(sequence.ids) - sequence.start for sequence in sequences]
    shape = (len(sequences), max(lengths), k)
    if reply.shape != shape or reply.completion_lengths != lengths:
        raise ValueError(f"shape {reply.shape} where {shape} was asked for, or other lengths")
    top_ids = _array(reply.token_ids_b64, "<i4", shape)
    top = _array(reply.logprobs_b64, "<f4", shape)
    actual_ids = _array(reply.actual_token_ids_b64, "<i4", (*shape[:2], 1))
    actual = _array(reply.actual_logprobs_b64, "<f4", (*shape[:2], 1))
    prompts: list[Entries] = []
    for i, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        said, value = actual_ids[i, :length], actual[i, :length]
        outside = (top_ids[i, :length] != said).all(axis=1)
        used = np.ones((length, k + 1), dtype=bool)
        used[:, k] = outside
        unread = np.full(sequence.start, UNKNOWN, dtype=np.int64)
        prompts.append(
            Entries(
                count=np.concatenate([np.zeros(sequence.start, np.int64), used.sum(axis=1)]),
                ids=np.concatenate([top_ids[i, :length], said], axis=1)[used].astype(np.int64),
                logprobs=np.concatenate([top[i, :length], value], axis=1)[used].astype(np.float64),
                echoed=np.concatenate([unread, np.where(np.isneginf(value), UNKNOWN, said)[:, 0]]),
            )
        )
    return Reply(model=None, prompts=prompts)


def _array(data: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    if len(data) != 4 * int(np.prod(shape)):
        raise ValueError(f"an array of {len(data)} bytes for shape {shape}")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def token_names(token_bytes: Sequence[bytes]) -> dict[str, int]:
    """String -> id of tokens by their bytes; a string of several tokens is `AMBIGUOUS`."""
    names: dict[str, int] = {}
    for index, piece in enumerate(token_bytes):
        text = piece.decode(errors="replace")
        names[text] = AMBIGUOUS if text in names or "\ufffd" in text else index
    return names


def _from_lists(positions: list[list[tuple[int, float | None]]], echoed: np.ndarray) -> Entries:
    flat = list(chain.from_iterable(positions))
    return Entries(
        count=np.fromiter(map(len, positions), dtype=np.int64, count=len(positions)),
        ids=_ids((index for index, _ in flat), len(flat)),
        logprobs=np.array([value for _, value in flat], dtype=np.float64),
        echoed=echoed,
    )


def _ids(values: object, count: int) -> np.ndarray:
    try:
        return np.fromiter(values, dtype=np.int64, count=count)  # pyright: ignore
    except OverflowError as error:
        raise ValueError("an id has more than 64 bits") from error


def _decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise ValueError(str(error)) from error


def _in_order(choices: list[Choice], num_prompts: int) -> list[Choice]:
    by_index = {choice.index: choice for choice in choices}
    if len(choices) != num_prompts or set(by_index) != set(range(num_prompts)):
        raise ValueError(f"{len(choices)} choices for {num_prompts} prompts, or numbered wrongly")
    return [by_index[i] for i in range(num_prompts)]
