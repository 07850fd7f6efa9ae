"""The seam of samplers, and what every sampler does with raw token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from mopd.serving.generation import Generated
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout, Source


class Sampler(Protocol):
    """Samples answers of one policy version.

    ``generate`` returns the rollouts of every prompt in order, ``num_generations`` each, for
    optimizer step ``step`` with the policy ``version``.
    ``load_weights`` refuses a version that is not newer (`StaleWeightsError`).
    ``probe`` gives the log-probabilities of the tokens of ``ids`` [L] but the first, at temperature
    1, as [engines, L - 1], so that they can be compared with the student's own; None: no engine.
    """

    @property
    def version(self) -> int: ...

    def generate(self, prompts: Sequence[Prompt], *, step: int, version: int) -> list[Rollout]: ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None: ...

    def answer(self, prompts: Sequence[Prompt]) -> list[Rollout]: ...

    def probe(self, ids: np.ndarray) -> np.ndarray | None: ...

    def close(self) -> None: ...


def make_rollout(
    prompt: Prompt,
    generated: Generated,
    *,
    tokenizer: ChatTokenizer,
    prompt_ids: np.ndarray,
    sample_index: int,
    version: int,
    source: Source = "student",
) -> Rollout:
    """A rollout from sampled ids, with its bytes and, where the task has an answer, its reward."""
    vocabulary = tokenizer.vocabulary
    response = vocabulary.decode(generated.token_ids)
    return Rollout(
        prompt=prompt,
        sample_index=sample_index,
        prompt_ids=prompt_ids,
        token_ids=generated.token_ids,
        loss_mask=np.ones(len(generated.token_ids), dtype=bool),
        logprobs=generated.logprobs,
        byte_ends=vocabulary.byte_ends(generated.token_ids),
        response=response,
        policy_version=version,
        finish_reason="stop" if generated.stopped else "cut" if generated.cut else "length",
        reward=exact_match(prompt, response, stopped=generated.stopped),
        source=source,
    )


def exact_match(prompt: Prompt, response: bytes, *, stopped: bool) -> float | None:
    """1 when the answer is right and the turn ended, 0 otherwise, None without an answer."""
    if prompt.answer is None:
        return None
    return float(stopped and response.strip() == prompt.answer.encode().strip())


def is_canonical(rollout: Rollout, tokenizer: ChatTokenizer) -> bool:
    """Whether the sampled ids are the tokenizer's own encoding of the text they spell."""
    ids = tokenizer.vocabulary.encode(rollout.response)
    if rollout.finish_reason == "stop":
        ids = [*ids, tokenizer.eos_id]
    return ids == rollout.token_ids.tolist()
