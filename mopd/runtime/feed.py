"""Prompts in, one aligned batch out: gathered, aligned, packed. Runs on the lead rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mopd.align.batch import Batching, Sample
from mopd.errors import TeacherError
from mopd.metrics.metric import Metric
from mopd.metrics.span import Spans
from mopd.rollout.base import is_canonical
from mopd.runtime.ahead import Ahead
from mopd.runtime.aligner import Aligner, Tally
from mopd.runtime.collate import Objective, collate
from mopd.runtime.gather import Gathered
from mopd.runtime.ledger import Ledger
from mopd.runtime.samples import SampleLog
from mopd.serving.journal import Journal
from mopd.serving.replies import ReplyJournal
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Rollout, StepBatch

UNSCORED = "unscored"


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedOptions:
    """``sum_over_replicas`` adds a vector over the lead ranks of all replicas."""

    objective: Objective
    batching: Batching
    max_failed_share: float
    sum_over_replicas: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """What a feed leaves behind: on disk, and in the ledger."""

    journal: Journal
    replies: ReplyJournal
    ledger: Ledger
    samples: SampleLog | None = None  # of one replica


class Feed:
    """`gather` gives this replica's answers of a step, with the scores of teachers that the lead
    can ask alone; `collate` makes the batch of them; `settle` tells what became of it.
    """

    def __init__(
        self,
        *,
        ahead: Ahead,
        student: ChatTokenizer,
        aligner: Aligner,
        books: Books,
        options: FeedOptions,
        spans: Spans,
    ) -> None:
        self.ahead = ahead
        self.books = books
        self._student = student
        self._aligner = aligner
        self._options = options
        self._spans = spans
        self._dropped: Counter[str] = Counter()
        self._num_rollouts = 0
        self.times: Mapping[str, Metric] = {}  # of the step that was taken last
        self.samples: Mapping[str, list[float]] = {}  # of that step, for its quantiles

    @property
    def chunks(self) -> dict[str, Counter[str]]:
        """Chunks and tokens by type, per teacher, over the run."""
        return self._aligner.chunks

    def gather(self, step: int) -> Gathered:
        """The step's rollouts and replies are durable before this returns."""
        with self._spans("gather"):
            gathered = self.ahead.take(step)
        self.times = gathered.times
        self.samples = {
            "response_length_p95": [float(len(r.token_ids)) for r in gathered.rollouts],
            **{
                f"latency_p{percent}/{name}": list(seconds)
                for name, seconds in gathered.latencies.items()
                for percent in (50, 95)
            },
        }
        return gathered

    def collate(self, gathered: Gathered) -> StepBatch:
        """Aligned and packed, with the global denominators. Collective over the leads."""
        with self._spans("align"):
            return self._collate(gathered)

    def settle(self, step: int, *, skipped: bool) -> None:
        """Books the answers of ``step`` as trained or dropped."""
        dropped = self._dropped
        trained = self._num_rollouts - sum(dropped.values())
        if skipped:
            dropped, trained = dropped + Counter(skipped_step=trained), 0
        self.books.ledger.settle(step, trained=trained, dropped=dropped)

    def close(self) -> None:
        """Ends the sampling ahead and closes the journal."""
        self.ahead.close()
        self.books.journal.close()
        if self.books.samples is not None:
            self.books.samples.close()

    def _collate(self, gathered: Gathered) -> StepBatch:
        tally = Tally()
        samples = self._aligner.samples(gathered.rollouts, gathered.scores, tally)
        self._count(gathered, samples, tally)
        if self.books.samples is not None:
            self.books.samples.log(gathered, self._aligner.alignment, trained=self._aligner.trained)
        batch, totals = collate(
            gathered.step,
            samples,
            scores=gathered.scores,
            masked=(tally.sums["masked"], tally.counts["masked"]),
            objective=self._options.objective,
            batching=self._options.batching,
            pad_id=self._student.pad_id,
            sum_over_replicas=self._sum_over_replicas,
        )
        self._refuse_escape(gathered.step, share=totals.masked_share)
        for name, weight in batch.weights.items():
            tally.add(f"weight/{name}", weight)
        return replace(batch, metrics=tally.metrics())

    def _sum_over_replicas(self, values: np.ndarray) -> np.ndarray:
        """Replicas meet here first in a step: the fast ones wait for the slowest."""
        with self._spans("wait"):
            return self._options.sum_over_replicas(values)

    def _count(self, gathered: Gathered, samples: list[Sample], tally: Tally) -> None:
        self._dropped, self._num_rollouts = Counter(gathered.dropped), len(samples)
        for rollout, sample in zip(gathered.rollouts, samples, strict=True):
            self._describe(gathered.step, rollout, tally)
            if rollout.loss_mask.any() and not any(len(r.position) for r in sample.rows.values()):
                self._dropped[UNSCORED] += 1
        for reason, count in self._dropped.items():
            tally.add(f"dropped/{reason}", count, len(samples))
        for per_teacher in gathered.scores:
            for name, scores in per_teacher.items():
                tally.add(f"scored/{name}", float(scores.valid.sum()), len(scores.valid))
        for name, count in gathered.troubles.items():
            tally.add(name, float(count))
        if gathered.rescored is not None:
            tally.add("rescored/nats", gathered.rescored.nats)
            tally.add("rescored/other_tokens", gathered.rescored.other_tokens)
        tally.add("journal_mb", (self.books.journal.num_bytes + self.books.replies.num_bytes) / 1e6)

    def _describe(self, step: int, rollout: Rollout, tally: Tally) -> None:
        domain = rollout.prompt.domain
        tally.add("on_policy", float(rollout.source == "student"))
        tally.add("response_length", len(rollout.token_ids))
        tally.add("truncated", float(rollout.finish_reason == "length"))
        if rollout.source != "student":
            return
        tally.add("staleness", step - rollout.policy_version)
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
