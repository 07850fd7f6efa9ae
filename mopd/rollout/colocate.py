"""A sampler around an engine in this process, which takes the weights by reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from mopd.errors import StaleWeightsError
from mopd.rollout.tasks import Job, Jobs
from mopd.serving.sampling import Sampled, SampleOptions, SampleTask
from mopd.types import Prompt, Rollout


class Engine(Protocol):
    """`mopd.serving.vllm_engine.LocalEngine`."""

    @property
    def max_length(self) -> int: ...

    def load(self, tensors: Mapping[str, Tensor], *, vocab_size: int) -> None: ...

    def sample(self, tasks: Sequence[SampleTask], options: SampleOptions) -> list[Sampled]: ...

    def logprobs(self, ids: Sequence[int]) -> np.ndarray: ...

    def close(self) -> None: ...


class ColocateSampler:
    """No version can be mixed up: nothing but this object reaches the engine."""

    def __init__(self, engine: Engine, *, jobs: Jobs) -> None:
        self._engine: Engine | None = engine
        self._jobs = jobs
        self.version = -1

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Takes every parameter of the student under its Hugging Face name.

        Raises:
            StaleWeightsError: the version is not newer. SamplerError: they do not fit.
        """
        if version <= self.version:
            raise StaleWeightsError(f"version {version} is not newer than {self.version}")
        self.version = -1  # half-loaded weights are no version
        self._running().load(dict(weights), vocab_size=self._jobs.vocab_size)
        self.version = version

    def generate(self, prompts: Sequence[Prompt], *, step: int, version: int) -> list[Rollout]:
        """Sampled answers under ``version``, which must be the one that was loaded."""
        if version != self.version:
            raise StaleWeightsError(f"asked for version {version}, have {self.version}")
        return self._answers(self._jobs.sampled(prompts, step=step), greedy=False)

    def answer(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Greedy answers, for evaluation."""
        return self._answers(self._jobs.greedy(prompts), greedy=True)

    def _answers(self, jobs: Sequence[Job], *, greedy: bool) -> list[Rollout]:
        if not jobs:
            return []
        engine = self._running()
        self._jobs.refuse_long(jobs, room=engine.max_length)
        answers = engine.sample([job.task for job in jobs], self._jobs.options(greedy=greedy))
        return self._jobs.rollouts(jobs, answers, version=self.version)

    def probe(self, ids: np.ndarray) -> np.ndarray:
        """[1, L - 1]."""
        return self._running().logprobs(ids.tolist())[None]

    def _running(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("the engine was closed")
        return self._engine

    def close(self) -> None:
        """Frees the engine; safe to call twice."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
