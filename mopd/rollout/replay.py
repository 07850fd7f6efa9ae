"""Reads rollouts back from a journal: the same answers in another layout, or under another loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mopd.errors import ArtifactError
from mopd.rollout.base import Sampler, make_rollout
from mopd.serving.generation import Generated
from mopd.serving.journal import read_journal
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout


class ReplaySampler:
    """Answers with what the journal at ``path`` holds for (step, prompt, sample).

    Weights are tracked by version only; ``live`` answers evaluation prompts and keeps them.
    """

    def __init__(
        self, path: Path, *, tokenizer: ChatTokenizer, num_generations: int, live: Sampler
    ) -> None:
        self._path = path
        self._records = read_journal(path)
        self._tokenizer = tokenizer
        self._num_generations = num_generations
        self._live = live

    @property
    def version(self) -> int:
        return self._live.version

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        self._live.load_weights(weights, version=version)

    def generate(self, prompts: Sequence[Prompt], *, step: int, version: int) -> list[Rollout]:
        """The journalled rollouts of ``step``, with the versions they were sampled under."""
        return [
            self._rollout(prompt, n, step)
            for prompt in prompts
            for n in range(self._num_generations)
        ]

    def _rollout(self, prompt: Prompt, sample: int, step: int) -> Rollout:
        record = self._records.get((step, prompt.id, sample))
        if record is None:
            raise ArtifactError(
                f"{self._path}: the journal has no step {step}, prompt {prompt.id}, sample "
                f"{sample}; "
                "replay with the seed, data and batch sizes it was written with"
            )
        return recorded_rollout(record, prompt, tokenizer=self._tokenizer)

    def answer(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        return self._live.answer(prompts)

    def probe(self, ids: np.ndarray) -> np.ndarray | None:
        return self._live.probe(ids)

    def close(self) -> None:
        self._live.close()


def recorded_rollout(
    record: Mapping[str, Any], prompt: Prompt, *, tokenizer: ChatTokenizer
) -> Rollout:
    """What a line of a journal says of ``prompt``."""
    generated = Generated(
        token_ids=np.asarray(record["ids"], dtype=np.int32),
        logprobs=np.asarray(record["logprobs"], dtype=np.float32),
        stopped=record["finish"] == "stop",
        cut=record["finish"] == "cut",
    )
    return make_rollout(
        prompt,
        generated,
        tokenizer=tokenizer,
        prompt_ids=tokenizer.prompt_ids(prompt.messages),
        sample_index=record["sample"],
        version=record["version"],
        source=record.get("source", "student"),
    )
