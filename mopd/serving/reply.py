"""Servers' JSON of prompt log-probabilities -> flat arrays. Whether to believe them comes later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, TypeVar

import msgspec
import numpy as np

# Ids of entries that are no token: strings that several tokens have, and strings that none has.
AMBIGUOUS, UNKNOWN = -2, -3

Shape = Literal["vllm", "openai"]


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
class Reply:
    """A whole reply: ``prompts`` in the order of the request."""

    model: str | None
    prompts: list[Entries]


class _Entry(msgspec.Struct, gc=False):
    logprob: float | None


class _VllmChoice(msgspec.Struct, gc=False):
    index: int
    prompt_logprobs: list[dict[int, _Entry] | None]
    prompt_token_ids: list[int] | None = None


class _VllmReply(msgspec.Struct, gc=False):
    choices: list[_VllmChoice]
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


T = TypeVar("T")
Choice = TypeVar("Choice", _VllmChoice, _OpenAiChoice)

_VLLM = msgspec.json.Decoder(_VllmReply)
_OPENAI = msgspec.json.Decoder(_OpenAiReply)
_SGLANG = msgspec.json.Decoder(list[_SglangReply])


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


def _vllm_entries(choice: _VllmChoice) -> Entries:
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


def decode_sglang(body: bytes, num_prompts: int) -> Reply:
    """SGLang's ``/generate`` with ``input_top_logprobs``: triples of log-probability, id, text.

    Raises:
        ValueError: not JSON of this shape, or not one reply for each prompt.
    """
    replies = _decode(_SGLANG, body if body.lstrip()[:1] == b"[" else b"[" + body + b"]")
    if len(replies) != num_prompts:
        raise ValueError(f"{len(replies)} replies for {num_prompts} prompts")
    prompts: list[Entries] = []
    for meta in (reply.meta_info for reply in replies):
        if len(meta.input_token_logprobs) != len(meta.input_top_logprobs):
            raise ValueError("input_token_logprobs and input_top_logprobs differ in length")
        positions: list[list[tuple[int, float | None]]] = []
        for actual, top in zip(meta.input_token_logprobs, meta.input_top_logprobs, strict=True):
            listed = [(index, value) for value, index, _ in top or ()]
            if top and actual[1] not in {index for index, _ in listed}:
                listed.append((actual[1], actual[0]))
            positions.append(listed)
        prompts.append(_from_lists(positions, _ids([a[1] for a in meta.input_token_logprobs], -1)))
    return Reply(model=None, prompts=prompts)


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
