"""Texts that a vLLM server writes: one prompt a request, token ids in and out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

PATH = "/v1/completions"
BYTES_PER_TOKEN = 256  # of a reply, at most: an id and the text of a token


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """An answer that is wanted. ``seed`` decides its draw, as far as the server's engine can."""

    prompt_ids: np.ndarray  # [P]
    seed: int
    max_new_tokens: int
    temperature: float
    eos_id: int

    def body(self, model: str) -> bytes:
        wanted: dict[str, Any] = {
            "model": model,
            "prompt": self.prompt_ids.tolist(),
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "stop_token_ids": [self.eos_id],
            "add_special_tokens": False,
            "return_token_ids": True,
        }
        return msgspec.json.encode(wanted)

    @property
    def max_bytes(self) -> int:
        return (1 << 16) + BYTES_PER_TOKEN * (len(self.prompt_ids) + self.max_new_tokens)

    def read(self, body: bytes) -> tuple[np.ndarray, bool]:
        """[S] ids without the end of the turn, and whether it was reached.

        Raises:
            ValueError: not a reply of this shape.
        """
        try:
            (choice,) = msgspec.json.decode(body, type=_Reply).choices
        except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
            raise ValueError(str(error)) from error
        if choice.token_ids is None:
            raise ValueError("the reply has no token ids; take a vLLM with return_token_ids")
        ids = np.array(choice.token_ids, dtype=np.int64)
        if len(ids) > self.max_new_tokens or (ids < 0).any():
            raise ValueError("more tokens than were asked for, or an id below 0")
        ends = np.flatnonzero(ids == self.eos_id)
        return (ids[: ends[0]], True) if len(ends) else (ids, False)


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None


class _Reply(msgspec.Struct):
    choices: list[_Choice]
