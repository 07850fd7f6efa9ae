"""What samplers around an engine have in common: keyed tasks in, rollouts out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mopd.errors import SamplerError
from mopd.rollout.base import make_rollout
from mopd.serving.generation import Generated
from mopd.serving.sampling import Sampled, SampleOptions, SampleTask
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """As in the recipe's ``run`` and ``rollout``; ``canonical`` is for HfSampler alone."""

    seed: int
    temperature: float
    max_new_tokens: int
    num_generations: int
    stop_token_ids: tuple[int, ...] = ()
    canonical: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """One answer to write."""

    prompt: Prompt
    number: int  # of the answers to this prompt
    task: SampleTask


class Jobs:
    """Prompts as an engine's tasks, and its answers as rollouts.

    An answer is keyed by (seed, prompt, number, step), so it does not depend on the server that
    writes it. It may on rounding, where two tokens are about equally likely.
    """

    def __init__(self, tokenizer: ChatTokenizer, options: SamplingOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer: what is sampled from."""
        return self._tokenizer.vocabulary.size

    def sampled(self, prompts: Sequence[Prompt], *, step: int) -> list[Job]:
        """``num_generations`` answers of every prompt, in order."""
        seed, samples = self._options.seed, range(self._options.num_generations)
        return [
            Job(prompt, n, _task(ids, key=f"{seed}|{prompt.id}|{n}|{step}"))
            for prompt in prompts
            for ids in [self._tokenizer.prompt_ids(prompt.messages).tolist()]
            for n in samples
        ]

    def greedy(self, prompts: Sequence[Prompt]) -> list[Job]:
        """One answer of every prompt."""
        read = self._tokenizer.prompt_ids
        return [Job(prompt, 0, _task(read(prompt.messages).tolist(), key="")) for prompt in prompts]

    def options(self, *, greedy: bool) -> SampleOptions:
        """For the engine."""
        return SampleOptions(
            max_tokens=self._options.max_new_tokens,
            temperature=0.0 if greedy else self._options.temperature,
            vocab_size=self.vocab_size,
            eos_id=self._tokenizer.eos_id,
            stop_ids=self._options.stop_token_ids,
        )

    def refuse_long(self, jobs: Sequence[Job], *, room: int) -> None:
        """An engine would cut the answers to prompts that are too long, and not say so.

        Raises:
            SamplerError: a prompt and its answer may exceed ``room`` tokens.
        """
        longest = max(jobs, key=lambda job: len(job.task.ids))
        size = len(longest.task.ids)
        if size + self._options.max_new_tokens > room:
            raise SamplerError(
                f"rollout.max_new_tokens={self._options.max_new_tokens}: prompt "
                f"{longest.prompt.id} has {size} tokens and the engine takes {room} together; "
                "lower it, or start the engine with a larger --max-model-len"
            )

    def rollouts(
        self, jobs: Sequence[Job], answers: Sequence[Sampled], *, version: int
    ) -> list[Rollout]:
        """One a job, in order. A stop token other than the end of the turn is left out."""
        return [
            make_rollout(
                job.prompt,
                _generated(answer),
                tokenizer=self._tokenizer,
                prompt_ids=np.asarray(job.task.ids, dtype=np.int32),
                sample_index=job.number,
                version=version,
            )
            for job, answer in zip(jobs, answers, strict=True)
        ]


def _task(ids: list[int], *, key: str) -> SampleTask:
    digest = hashlib.sha256(key.encode()).digest()
    return SampleTask(ids=ids, seed=int.from_bytes(digest[:8], "little") >> 1)


def _generated(answer: Sampled) -> Generated:
    size = len(answer.ids) - (answer.end == "stop")
    return Generated(
        token_ids=answer.ids[:size],
        logprobs=answer.logprobs[:size],
        stopped=answer.end == "eos",
        cut=answer.end == "stop",
    )
