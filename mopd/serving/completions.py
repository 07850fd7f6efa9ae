"""Writing at a server around transformers: the part of vLLM's `/v1/completions` that mopd asks for.

Prompts are token ids, and so are answers (``return_token_ids``). Fields that mopd does not send are
refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mopd.serving.drafts import PATH
from mopd.serving.sampling import read_ids, read_object
from mopd.serving.scoring import RequestError, ScoreLimits

COMPLETIONS_PATH = PATH
FIELDS = {
    *("prompt", "max_tokens", "temperature", "seed", "stop_token_ids"),
    *("add_special_tokens", "return_token_ids"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """Answers that are wanted. ``temperature`` 0 is greedy."""

    prompts: tuple[np.ndarray, ...]  # [P] each
    max_tokens: int
    temperature: float
    seed: int
    stop_ids: tuple[int, ...]


def read_completion(body: bytes, *, limits: ScoreLimits) -> CompletionRequest:
    """The request in ``body``.

    Raises:
        RequestError: malformed, or beyond ``limits``.
    """
    fields = read_object(body, FIELDS)
    if fields["add_special_tokens"] is not False or fields["return_token_ids"] is not True:
        raise RequestError("add_special_tokens: false, and return_token_ids: true")
    size, temperature = fields["max_tokens"], fields["temperature"]
    if type(size) is not int or not 1 <= size <= limits.max_length:
        raise RequestError(f"max_tokens: an integer from 1 to {limits.max_length}")
    if type(temperature) not in (int, float) or not 0 <= temperature <= 1e3:
        raise RequestError("temperature: between 0 and 1000")
    if type(fields["seed"]) is not int or not 0 <= fields["seed"] < 1 << 63:
        raise RequestError("seed: an integer from 0 to 2^63 - 1")
    stops = read_ids(
        fields["stop_token_ids"], "stop_token_ids", longest=64, vocab_size=limits.vocab_size
    )
    return CompletionRequest(
        prompts=_prompts(fields["prompt"], longest=limits.max_length - size, limits=limits),
        max_tokens=size,
        temperature=float(temperature),
        seed=fields["seed"],
        stop_ids=tuple(stops),
    )


def _prompts(value: Any, *, longest: int, limits: ScoreLimits) -> tuple[np.ndarray, ...]:
    """One list of ids, or a list of them."""
    several = isinstance(value, list) and bool(value) and isinstance(value[0], list)
    prompts = value if several else [value]
    if len(prompts) > limits.max_sequences:
        raise RequestError(f"prompt: up to {limits.max_sequences} of them")
    return tuple(
        np.asarray(read_ids(ids, "prompt", longest=longest, vocab_size=limits.vocab_size))
        for ids in prompts
    )


def encode_completion(model: str, answers: Sequence[np.ndarray]) -> bytes:
    """The reply; of each answer the ids, with the one that ended it."""
    choices = [{"index": i, "token_ids": ids.tolist()} for i, ids in enumerate(answers)]
    return json.dumps({"model": model, "choices": choices}, separators=(",", ":")).encode()
