"""Prompts in, one aligned batch out: sample, score, align, pack. Runs on the lead rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mopd.errors import TeacherError
from mopd.metrics.span import Spans
from mopd.rollout.base import Sampler, is_canonical
from mopd.runtime.aligner import Aligner, Tally
from mopd.runtime.collate import Objective, collate
from mopd.runtime.data import PromptSource
from mopd.serving.journal import Journal
from mopd.teachers.pool import TeacherPool
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout, StepBatch, TeacherScores


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedOptions:
    """``sum_over_replicas`` adds a vector over the lead ranks of all replicas."""

    objective: Objective
    micro_batch_size: int
    max_failed_share: float
    dp_rank: int
    dp_size: int
    sum_over_replicas: Callable[[np.ndarray], np.ndarray]


class Feed:
    """``take(step)`` gives this replica's share of a step and its global denominators."""

    def __init__(
        self,
        *,
        source: PromptSource,
        sampler: Sampler,
        pool: TeacherPool,
        student: ChatTokenizer,
        aligner: Aligner,
        journal: Journal,
        options: FeedOptions,
        spans: Spans,
    ) -> None:
        self._source = source
        self._sampler = sampler
        self._pool = pool
        self._student = student
        self._aligner = aligner
        self._journal = journal
        self._options = options
        self._spans = spans

    @property
    def chunks(self) -> dict[str, Counter[str]]:
        """Chunks and tokens by type, per teacher, over the run."""
        return self._aligner.chunks

    def take(self, step: int) -> StepBatch:
        """Samples with policy version ``step``; the rollouts are durable before this returns."""
        prompts = self._share(self._source.take(step))
        with self._spans("rollout"):
            rollouts = self._sampler.generate(prompts, version=step)
        with self._spans("journal"):
            self._journal.append(step, rollouts)
        with self._spans("teachers"):
            scores = self._pool.score(rollouts)
        with self._spans("align"):
            return self._collate(step, rollouts, scores)

    def _share(self, prompts: list[Prompt]) -> list[Prompt]:
        """A contiguous part: prompts alternate between domains, so each replica has them all."""
        size = len(prompts) // self._options.dp_size
        return prompts[self._options.dp_rank * size :][:size]

    def _collate(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        scores: Sequence[Mapping[str, TeacherScores]],
    ) -> StepBatch:
        tally = Tally()
        samples = self._aligner.samples(rollouts, scores, tally)
        for rollout in rollouts:
            self._describe(rollout, tally)
        batch, totals = collate(
            step,
            samples,
            scores=scores,
            masked=(tally.sums["masked"], tally.counts["masked"]),
            objective=self._options.objective,
            micro_batch_size=self._options.micro_batch_size,
            pad_id=self._student.pad_id,
            sum_over_replicas=self._options.sum_over_replicas,
        )
        self._refuse_escape(step, share=totals.masked_share)
        for name, count in self._pool.troubles().items():
            tally.add(name, float(count))
        for name, weight in batch.weights.items():
            tally.add(f"weight/{name}", weight)
        return replace(batch, metrics=tally.metrics())

    def _describe(self, rollout: Rollout, tally: Tally) -> None:
        domain = rollout.prompt.domain
        tally.add("truncated", float(rollout.finish_reason == "length"))
        tally.add("response_length", len(rollout.token_ids))
        canonical = float(is_canonical(rollout, self._student))
        tally.add("canonical", canonical)
        tally.add(f"canonical/{domain}", canonical)
        if rollout.reward is not None:
            tally.add("accuracy", rollout.reward)
            tally.add(f"accuracy/{domain}", rollout.reward)

    def _refuse_escape(self, step: int, *, share: float) -> None:
        """A policy must not get away with text that no teacher can judge; alike on all replicas."""
        if share > self._options.max_failed_share:
            raise TeacherError(
                f"step {step}: {share:.0%} of the response tokens could not be scored by any "
                "teacher (limit distillation.max_failed_share); the policy has left the text that "
                "the teachers can read: lower student.optimizer.lr or start from a warmer student"
            )
