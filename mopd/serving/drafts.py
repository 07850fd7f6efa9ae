"""Texts that servers write: token ids in and out, by the path that vLLM has for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

PATH = "/v1/completions"
BYTES_PER_TOKEN = 256  # of a reply, at most: an id and the text of a token


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Answers that are wanted, one a prompt.

    ``seed`` decides their draw, as far as the server's engine can; vLLM seeds a request and not
    its prompts, so answers that are drawn are asked for one by one.
    """

    prompts: tuple[np.ndarray, ...]  # [P] each
    seed: int
    max_new_tokens: int
    temperature: float
    eos_id: int

    def body(self, model: str | None) -> bytes:
        """``model`` is the name that the server lists; None takes its only one."""
        prompts = [ids.tolist() for ids in self.prompts]
        wanted: dict[str, Any] = {
            "prompt": prompts if len(prompts) > 1 else prompts[0],
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "stop_token_ids": [self.eos_id],
            "add_special_tokens": False,
            "return_token_ids": True,
        }
        if model is not None:
            wanted["model"] = model
        return msgspec.json.encode(wanted)

    @property
    def max_bytes(self) -> int:
        tokens = sum(len(ids) + self.max_new_tokens for ids in self.prompts)
        return (1 << 16) * len(self.prompts) + BYTES_PER_TOKEN * tokens

    def read(self, body: bytes) -> list[tuple[np.ndarray, bool]]:
        """Per prompt [S] ids without the end of the turn, and whether it was reached.

        Raises:
            ValueError: not a reply of this shape.
        """
        try:
            choices = msgspec.json.decode(body, type=_Reply).choices
        except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
            raise ValueError(str(error)) from error
        choices.sort(key=lambda choice: choice.index)
        if [choice.index for choice in choices] != list(range(len(self.prompts))):
            raise ValueError(f"{len(self.prompts)} answers were asked for")
        return [self._cut(choice.token_ids) for choice in choices]

    def _cut(self, found: list[int] | None) -> tuple[np.ndarray, bool]:
        if found is None:
            raise ValueError("the reply has no token ids; take a vLLM with return_token_ids")
        ids = np.array(found, dtype=np.int64)
        if len(ids) > self.max_new_tokens or (ids < 0).any():
            raise ValueError("more tokens than were asked for, or an id below 0")
        ends = np.flatnonzero(ids == self.eos_id)
        return (ids[: ends[0]], True) if len(ends) else (ids, False)


class _Choice(msgspec.Struct):
    index: int = 0
    token_ids: list[int] | None = None


class _Reply(msgspec.Struct):
    choices: list[_Choice]
