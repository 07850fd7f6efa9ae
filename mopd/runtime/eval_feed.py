"""Held-out prompts in, aligned batches out, for losses that nobody trains on. On the lead rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mopd.align.batch import Batching
from mopd.rollout.base import Sampler
from mopd.rollout.offpolicy import written_rollout
from mopd.runtime.aligner import Aligner, Tally
from mopd.runtime.collate import Objective, collate
from mopd.runtime.gather import Gathered, drain_troubles
from mopd.teachers.pool import TeacherPool
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout, StepBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """As in the recipe; ``dp_rank`` of ``dp_size`` replicas takes its share of the prompts.

    ``scales``: what the teachers' losses and the cross entropy count.
    """

    dp_rank: int
    dp_size: int
    batching: Batching
    max_new_tokens: int
    mask_truncated: bool
    scales: tuple[float, float]
    sum_over_replicas: Callable[[np.ndarray], np.ndarray]


class EvalFeed:
    """As `mopd.runtime.feed.Feed`, without books: nothing is journalled, counted or kept.

    Its aligner is its own, so that a run's counts of chunks stay those of its training.
    """

    def __init__(
        self,
        *,
        sampler: Sampler | None,
        pool: TeacherPool,
        student: ChatTokenizer,
        aligner: Aligner,
        objective: Objective,
        options: EvalOptions,
    ) -> None:
        self._sampler = sampler
        self._pool = pool
        self._student = student
        self.aligner = aligner
        self._objective = objective
        self._options = options

    def answered(self, prompts: Sequence[Prompt]) -> Gathered:
        """The student's greedy answers to ``prompts``, which is the same list on all replicas."""
        assert self._sampler is not None
        mine = self._share(prompts)
        rollouts = self._sampler.answer(mine or prompts[:1])
        return self.scored(rollouts if mine else [_masked(rollouts[0])])

    def given(self, prompts: Sequence[Prompt]) -> Gathered:
        """The answers that come with ``prompts``, as an off-policy step would train on them."""
        mine = self._share(prompts)
        rollouts = [self._written(prompt) for prompt in mine or prompts[:1]]
        return self.scored(rollouts if mine else [_masked(rollouts[0])])

    def collate(self, gathered: Gathered) -> StepBatch:
        """Aligned, with the global denominators. Collective over the leads."""
        tally = Tally()
        batch, _ = collate(
            0,
            self.aligner.samples(gathered.rollouts, gathered.scores, tally),
            scores=gathered.scores,
            masked=(tally.sums["masked"], tally.counts["masked"]),
            objective=self._objective,
            batching=self._options.batching,
            pad_id=self._student.pad_id,
            sum_over_replicas=self._options.sum_over_replicas,
        )
        distillation, crossentropy = self._options.scales
        return replace(batch, distillation_weight=distillation, crossentropy_weight=crossentropy)

    def troubles(self) -> dict[str, int]:
        """What went wrong at teachers and samplers: kind/who/why -> number, once."""
        return drain_troubles(self._pool, self._sampler)

    def _share(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        return list(prompts)[self._options.dp_rank :: self._options.dp_size]

    def _written(self, prompt: Prompt) -> Rollout:
        rollout = written_rollout(
            prompt,
            (prompt.response or "").encode(),
            stopped=True,
            source="dataset",
            tokenizer=self._student,
            sample_index=0,
            max_new_tokens=self._options.max_new_tokens,
            version=0,
        )
        cut = self._options.mask_truncated and rollout.finish_reason == "length"
        return _masked(rollout) if cut else rollout

    def scored(self, rollouts: Sequence[Rollout]) -> Gathered:
        """What the pool's teachers say of ``rollouts``."""
        index = [i for i, rollout in enumerate(rollouts) if rollout.loss_mask.any()]
        found = self._pool.score([rollouts[i] for i in index])
        scores = [{} for _ in rollouts]
        for i, per_teacher in zip(index, found, strict=True):
            scores[i] = per_teacher
        return Gathered(step=0, rollouts=rollouts, scores=scores)


def _masked(rollout: Rollout) -> Rollout:
    """A text that counts nothing: what an idle replica brings to a collective forward."""
    return replace(rollout, loss_mask=np.zeros_like(rollout.loss_mask))
