"""Prompts in, one aligned batch out: sample, score, align, pack. Runs on the lead rank."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mopd.align.batch import Sample, make_micro_batches
from mopd.align.boundaries import align_positions, chunk_counts
from mopd.align.payload import PayloadOptions, teacher_rows
from mopd.align.tokens import TextAlignment, TokenText, align_tokens
from mopd.errors import TeacherError
from mopd.metrics.span import Spans
from mopd.rollout.base import Sampler, is_canonical
from mopd.runtime.data import PromptSource
from mopd.serving.journal import Journal
from mopd.teachers.pool import TeacherPool
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout, StepBatch, TeacherRows, TeacherScores


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedOptions:
    """``sum_over_replicas`` adds a vector over the lead ranks of all replicas."""

    micro_batch_size: int
    alignment: str
    max_failed_share: float
    dp_rank: int
    dp_size: int
    sum_over_replicas: Callable[[np.ndarray], np.ndarray]


@dataclass(slots=True)
class _Tally:
    """Sums and counts of one step's metrics on this replica."""

    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        self.sums[name] += value
        self.counts[name] += count


class Feed:
    """``take(step)`` gives this replica's share of a step and its global denominators."""

    def __init__(
        self,
        *,
        source: PromptSource,
        sampler: Sampler,
        pool: TeacherPool,
        student: ChatTokenizer,
        payload: Mapping[str, PayloadOptions],
        journal: Journal,
        options: FeedOptions,
        spans: Spans,
    ) -> None:
        self._source = source
        self._sampler = sampler
        self._pool = pool
        self._student = student
        self._payload = payload
        self._journal = journal
        self._options = options
        self._spans = spans
        self.chunks: dict[str, Counter[str]] = {name: Counter() for name in payload}

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
        tally = _Tally()
        samples = []
        for rollout, per_teacher in zip(rollouts, scores, strict=True):
            rows = {name: self._align(rollout, score, tally) for name, score in per_teacher.items()}
            self._describe(rollout, rows, tally)
            samples.append(Sample(rollout=rollout, rows=rows))
        micro_batches = make_micro_batches(
            samples, micro_batch_size=self._options.micro_batch_size, pad_id=self._student.pad_id
        )
        names = list(self._payload)
        local = [
            float(sum(len(m.rows[name].position) for m in micro_batches if name in m.rows))
            for name in names
        ]
        tokens = float(sum(int(m.lengths.sum()) for m in micro_batches))
        unjudged = [tally.sums["masked"], tally.counts["masked"]]
        total = self._options.sum_over_replicas(np.asarray([*local, tokens, *unjudged]))
        self._refuse_escape(step, share=total[-2] / max(total[-1], 1.0))
        return StepBatch(
            step=step,
            micro_batches=micro_batches,
            denominators=dict(zip(names, total[: len(names)].tolist(), strict=True)),
            num_tokens=int(total[len(names)]),
            metrics={name: (tally.sums[name], tally.counts[name]) for name in tally.sums},
        )

    def _align(self, rollout: Rollout, scores: TeacherScores, tally: _Tally) -> TeacherRows:
        found = self._alignment(rollout, scores)
        covered = found.covered
        tally.add(f"alignment/{scores.teacher}", covered, len(rollout.token_ids))
        for method in ("offsets", "strings"):
            tally.add(f"alignment_{method}/{scores.teacher}", float(found.method == method))
        tally.add(f"alignment_mismatch/{scores.teacher}", float(found.mismatch is not None))
        counts = self.chunks[scores.teacher]
        for kind, (chunks, tokens) in chunk_counts(found.alignment, kept=found.kept).items():
            counts[f"chunks {kind}"] += chunks
            counts[f"tokens {kind}"] += tokens
        counts["tokens unaligned"] += len(rollout.token_ids) - covered
        return teacher_rows(
            scores,
            found.alignment,
            student_ids=rollout.token_ids,
            trainable=found.trainable(rollout.loss_mask),
            options=self._payload[scores.teacher],
        )

    def _alignment(self, rollout: Rollout, scores: TeacherScores) -> TextAlignment:
        if self._options.alignment == "position":
            by_index = align_positions(len(rollout.token_ids), len(scores.token_ids))
            every = np.ones(by_index.num_chunks, dtype=bool)
            return TextAlignment(alignment=by_index, kept=every, method="bytes")
        teacher = self._pool.teachers[scores.teacher].tokenizer
        student_stops = rollout.finish_reason == "stop"
        teacher_stops = len(scores.token_ids) > 0 and scores.token_ids[-1] == teacher.eos_id
        read = slice(-1) if teacher_stops else slice(None)
        return align_tokens(
            TokenText(
                ids=rollout.token_ids[:-1] if student_stops else rollout.token_ids,
                vocabulary=self._student.vocabulary,
            ),
            TokenText(
                ids=scores.token_ids[read],
                vocabulary=teacher.vocabulary,
                byte_ends=scores.byte_ends[read],
            ),
            both_end_turn=bool(student_stops and teacher_stops),
        )

    def _describe(self, rollout: Rollout, rows: Mapping[str, TeacherRows], tally: _Tally) -> None:
        size = len(rollout.token_ids)
        judged, boundary = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
        for of_teacher in rows.values():
            judged[of_teacher.token_position] = True
            boundary[of_teacher.position] = True
        tally.add("masked", float((~judged).sum()), size)
        tally.add("interior", float((judged & ~boundary).sum()), size)
        tally.add("truncated", float(rollout.finish_reason == "length"))
        tally.add("response_length", size)
        domain = rollout.prompt.domain
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
