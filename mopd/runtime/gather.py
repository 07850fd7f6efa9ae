"""A step's answers and what its teachers say of them: sampled, journalled, scored."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mopd.errors import ArtifactError
from mopd.metrics.metric import Metric
from mopd.metrics.span import Spans
from mopd.rollout.base import Sampler
from mopd.rollout.offpolicy import is_on_policy, written_rollout
from mopd.rollout.replay import recorded_rollout
from mopd.runtime.data import PromptSource
from mopd.runtime.ledger import Ledger
from mopd.serving.journal import Journal
from mopd.serving.replies import Difference, Replies, ReplyJournal
from mopd.teachers.base import Counting, Writer
from mopd.teachers.pool import TeacherPool
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout, Source, TeacherScores


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherOptions:
    """As in the recipe; ``dp_rank`` of ``dp_size`` replicas takes its share of the prompts."""

    dp_rank: int
    dp_size: int
    num_generations: int
    max_new_tokens: int
    seed: int
    temperature: float = 1.0
    max_staleness: int = 0
    lmbda: float = 1.0
    off_policy: Source = "dataset"
    mask_truncated: bool = False
    replays: bool = False  # the sampler has all answers, whoever wrote them


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """One replica's answers of a step. Dropped ones have no scores and an empty loss mask."""

    step: int
    rollouts: Sequence[Rollout]
    scores: Sequence[Mapping[str, TeacherScores]]
    dropped: Mapping[str, int] = field(default_factory=dict)  # answers by reason
    rescored: Difference | None = None  # against the digest of an earlier score
    times: Mapping[str, Metric] = field(default_factory=dict)
    troubles: Mapping[str, int] = field(default_factory=dict)  # kind/who/why -> number
    latencies: Mapping[str, Sequence[float]] = field(default_factory=dict)  # s, by teacher


class Gatherer:
    """`sample` and `score` are the two halves of a step; what they return is durable.

    After a restart both give back what the journals hold of the step. Without a sampler all
    answers come with the data.
    """

    def __init__(
        self,
        *,
        source: PromptSource,
        sampler: Sampler | None,
        pool: TeacherPool,
        student: ChatTokenizer,
        journal: Journal,
        replies: ReplyJournal,
        ledger: Ledger,
        options: GatherOptions,
    ) -> None:
        self._source = source
        self._sampler = sampler
        self._pool = pool
        self._student = student
        self._journal = journal
        self._replies = replies
        self._ledger = ledger
        self._options = options
        self._spans = Spans()

    def sample(self, step: int, *, version: int) -> list[Rollout]:
        """The answers of ``step``, from policy ``version``."""
        prompts = self._share(self._source.take(step))
        size = len(prompts) * self._options.num_generations
        self._ledger.issue(step, size)
        records = self._journal.recorded(step)
        if records is not None:
            return self._recorded(step, prompts, records)
        with self._spans("rollout"):
            rollouts = self._generate(prompts, step, version)
        with self._spans("journal"):
            self._journal.append(step, rollouts)
        return rollouts

    def score(self, step: int, rollouts: Sequence[Rollout]) -> Gathered:
        """With the replies of every teacher that was asked."""
        kept, dropped = self._drop(step, rollouts)
        index = [i for i, rollout in enumerate(kept) if rollout.loss_mask.any()]
        asked = [kept[i] for i in index]
        replies = self._replies.read(step, asked)
        difference = None
        troubles: dict[str, int] = {}
        latencies: dict[str, list[float]] = {}
        if replies is None:
            self._pool.latencies()  # of evaluations, which are not this step's
            with self._spans("teachers"):
                found = self._pool.score(asked)
            # nothing to compare where all teachers are asked elsewhere (`mopd.runtime.inside`)
            difference = self._replies.compare(step, asked, found) if any(found) else None
            troubles = drain_troubles(self._pool, self._sampler)
            latencies = self._pool.latencies()
            missing = {name: n for name, n in troubles.items() if name.startswith("missing/")}
            replies = Replies(scores=found, missing=missing)
            with self._spans("journal"):
                self._replies.append(step, asked, replies)
        scores: list[Mapping[str, TeacherScores]] = [{} for _ in kept]
        for i, per_teacher in zip(index, replies.scores, strict=True):
            scores[i] = per_teacher
        return Gathered(
            step=step,
            rollouts=kept,
            scores=scores,
            dropped=dropped,
            rescored=difference,
            times=self._spans.drain(),
            troubles=troubles | replies.missing,
            latencies=latencies,
        )

    def _share(self, prompts: list[Prompt]) -> list[Prompt]:
        """A contiguous part: prompts alternate between domains, so each replica has them all."""
        size = len(prompts) // self._options.dp_size
        return prompts[self._options.dp_rank * size :][:size]

    def _recorded(self, step: int, prompts: Sequence[Prompt], records: list) -> list[Rollout]:
        by_id = {prompt.id: prompt for prompt in prompts}
        expected = [(p.id, n) for p in prompts for n in range(self._options.num_generations)]
        found = {(record["prompt"], record["sample"]): record for record in records}
        if sorted(found) != sorted(expected):
            raise ArtifactError(
                f"the journal holds other answers for step {step} than this recipe asks for; "
                "restore the data, or train under another run.name"
            )
        return [
            recorded_rollout(found[key], by_id[key[0]], tokenizer=self._student) for key in expected
        ]

    def _generate(self, prompts: Sequence[Prompt], step: int, version: int) -> list[Rollout]:
        options = self._options
        own = [
            # a journal has the answers of others, too
            options.replays
            or is_on_policy(prompt, step=step, seed=options.seed, lmbda=options.lmbda)
            for prompt in prompts
        ]
        asked = [prompt for prompt, student in zip(prompts, own, strict=True) if student]
        others = [prompt for prompt, student in zip(prompts, own, strict=True) if not student]
        sampled = deque(self._sampled(asked, step, version))
        written = deque(self._write(others, step, version))
        return [
            (sampled if student else written).popleft()
            for student in own
            for _ in range(options.num_generations)
        ]

    def _sampled(self, prompts: Sequence[Prompt], step: int, version: int) -> list[Rollout]:
        if not prompts:
            return []
        assert self._sampler is not None, "answers come from the data, and a prompt was sampled"
        return self._sampler.generate(prompts, step=step, version=version)

    def _write(self, prompts: Sequence[Prompt], step: int, version: int) -> list[Rollout]:
        """Off-policy answers, ``num_generations`` of each prompt."""
        options = self._options
        tasks = [(prompt, n) for prompt in prompts for n in range(options.num_generations)]
        if options.off_policy == "dataset":
            texts = [((prompt.response or "").encode(), True) for prompt, _ in tasks]
        else:
            keys = [f"{options.seed}|teacher|{prompt.id}|{n}|{step}" for prompt, n in tasks]
            texts = self._written_by_teachers([prompt for prompt, _ in tasks], keys)
        return [
            written_rollout(
                prompt,
                text,
                stopped=stopped,
                source=options.off_policy,
                tokenizer=self._student,
                sample_index=n,
                max_new_tokens=options.max_new_tokens,
                version=version,
            )
            for (prompt, n), (text, stopped) in zip(tasks, texts, strict=True)
        ]

    def _written_by_teachers(
        self, prompts: Sequence[Prompt], keys: Sequence[str]
    ) -> list[tuple[bytes, bool]]:
        """Each by the first of its teachers that can write."""
        texts: list[tuple[bytes, bool]] = [(b"", False)] * len(prompts)
        author: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            author.setdefault(self._author(prompt), []).append(i)
        for name, index in author.items():
            teacher = self._pool.teachers[name]
            assert isinstance(teacher, Writer)
            found = teacher.write(
                [prompts[i] for i in index],
                [keys[i] for i in index],
                max_new_tokens=self._options.max_new_tokens,
                temperature=self._options.temperature,
            )
            for i, text in zip(index, found, strict=True):
                texts[i] = text
        return texts

    def _author(self, prompt: Prompt) -> str:
        # build_feed refuses prompts without one
        teachers = self._pool.teachers
        return next(name for name in prompt.teachers if isinstance(teachers[name], Writer))

    def _drop(self, step: int, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Counter[str]]:
        """Answers that the recipe does not train on lose their loss mask and are counted."""
        kept: list[Rollout] = []
        dropped: Counter[str] = Counter()
        for rollout in rollouts:
            reason = self._refusal(step, rollout)
            if reason is not None:
                dropped[reason] += 1
                rollout = replace(rollout, loss_mask=np.zeros_like(rollout.loss_mask))
            kept.append(rollout)
        return kept, dropped

    def _refusal(self, step: int, rollout: Rollout) -> str | None:
        age = step - rollout.policy_version
        if rollout.source == "student" and not 0 <= age <= self._options.max_staleness:
            return "stale"
        if self._options.mask_truncated and rollout.finish_reason == "length":
            return "truncated"
        return None if rollout.loss_mask.any() else "empty"


def drain_troubles(pool: TeacherPool, sampler: Sampler | None) -> dict[str, int]:
    """What went wrong at teachers and samplers since the last call: kind/who/why -> number."""
    found = pool.troubles()
    if isinstance(sampler, Counting):
        for kind, counts in sampler.drain().items():
            found |= {f"{kind}/rollout/{reason}": count for reason, count in counts.items()}
    return found
