"""Composes the feed of a lead rank: who samples, who judges, what is written down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mopd.align.batch import Batching
from mopd.config.keys import printable
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError
from mopd.metrics.span import Spans
from mopd.rollout.base import Sampler
from mopd.runtime.ahead import Ahead
from mopd.runtime.aligner import Aligner, AlignOptions
from mopd.runtime.collate import Objective
from mopd.runtime.data import PromptSource
from mopd.runtime.eval_feed import EvalFeed, EvalOptions
from mopd.runtime.feed import Books, Feed, FeedOptions
from mopd.runtime.gather import Gatherer, GatherOptions
from mopd.runtime.ledger import Ledger
from mopd.runtime.objective import loss_balance, step_objective
from mopd.runtime.payloads import Pair, payload_options
from mopd.runtime.replica import max_over_leads, sum_over_leads
from mopd.runtime.samples import SampleLog, SampleOptions
from mopd.runtime.teachers import context_warnings
from mopd.serving.journal import Journal, journal_path
from mopd.serving.replies import ReplyJournal
from mopd.student.parallel import Topology
from mopd.teachers.base import Writer
from mopd.teachers.pool import TeacherPool
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt


def build_feed(
    config: RunConfig,
    found: Mapping[str, Pair],
    *,
    prompts: Sequence[Prompt],
    sampler: Sampler | None,
    pool: TeacherPool,
    tokenizers: tuple[ChatTokenizer, Mapping[str, ChatTokenizer]],
    run: tuple[Topology, Spans, Path],
) -> Feed:
    """``tokenizers``: the student's and the teachers'. ``run``: where it runs, and what times it.

    Raises:
        ConfigError: answers shall come with the data or from teachers, and a row has none or
            nobody to write it; or no prompt leaves a teacher room to read an answer.
    """
    topology, spans, directory = run
    student, _ = tokenizers
    _check_responses(config, prompts, pool)
    for warning in context_warnings(config, pool, prompts):
        if topology.dp_rank == 0:
            print(printable(f"warning: {warning}"), flush=True)
    objective = step_objective(config, (prompt.domain for prompt in prompts))
    books = _books(config, directory, replica=topology.dp_rank, tokenizers=tokenizers)
    gatherer = Gatherer(
        source=PromptSource(
            prompts,
            num_prompts_per_step=config.train.num_prompts_per_step,
            seed=config.run.seed,
            balance=config.train.balance_domains,
        ),
        sampler=sampler,
        pool=pool,
        student=student,
        journal=books.journal,
        replies=books.replies,
        ledger=books.ledger,
        options=_gather_options(config, topology),
    )
    return Feed(
        ahead=Ahead(gatherer, lag=config.rollout.max_staleness, num_steps=config.train.steps),
        student=student,
        aligner=_aligner(config, found, tokenizers, objective, topology),
        books=books,
        options=FeedOptions(
            objective=objective,
            batching=_batching(config),
            max_failed_share=config.distillation.max_failed_share,
            sum_over_replicas=lambda values: sum_over_leads(topology, values),
        ),
        spans=spans,
    )


def build_eval_feed(
    config: RunConfig,
    found: Mapping[str, Pair],
    *,
    domains: Iterable[str],
    sampler: Sampler | None,
    pool: TeacherPool,
    tokenizers: tuple[ChatTokenizer, Mapping[str, ChatTokenizer]],
    topology: Topology,
) -> EvalFeed:
    """For losses without books; the recipe's scales, without their running means.

    ``domains`` are all that its prompts may have.
    """
    objective = step_objective(config, domains)
    return EvalFeed(
        sampler=sampler,
        pool=pool,
        student=tokenizers[0],
        aligner=_aligner(config, found, tokenizers, objective, topology),
        objective=objective,
        options=EvalOptions(
            dp_rank=topology.dp_rank,
            dp_size=topology.dp_size,
            batching=_batching(config),
            max_new_tokens=config.rollout.max_new_tokens,
            mask_truncated=config.rollout.mask_truncated_completions,
            scales=loss_balance(config).scales(),
            sum_over_replicas=lambda values: sum_over_leads(topology, values),
        ),
    )


def _batching(config: RunConfig) -> Batching:
    return Batching(
        size=config.train.micro_batch_size,
        max_tokens=config.train.max_tokens_per_micro_batch,
        packing=config.train.packing,
    )


def _books(
    config: RunConfig,
    directory: Path,
    *,
    replica: int,
    tokenizers: tuple[ChatTokenizer, Mapping[str, ChatTokenizer]],
) -> Books:
    return Books(
        journal=Journal(journal_path(directory, replica)),
        replies=ReplyJournal(
            directory / "journal",
            replica,
            level=config.journal.replies,
            max_bytes=config.journal.max_gb * 1e9,
        ),
        ledger=Ledger(),
        samples=_samples(config, directory, tokenizers) if replica == 0 else None,
    )


def _samples(
    config: RunConfig,
    directory: Path,
    tokenizers: tuple[ChatTokenizer, Mapping[str, ChatTokenizer]],
) -> SampleLog | None:
    if config.logging.sample_interval is None:
        return None
    return SampleLog(
        directory / "samples.jsonl",
        student=tokenizers[0],
        teachers=tokenizers[1],
        options=SampleOptions(
            interval=config.logging.sample_interval,
            per_domain=config.logging.samples_per_domain,
            num_steps=config.train.steps,
        ),
    )


def _gather_options(config: RunConfig, topology: Topology) -> GatherOptions:
    rollout = config.rollout
    return GatherOptions(
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        num_generations=rollout.num_generations_per_prompt,
        max_new_tokens=rollout.max_new_tokens,
        seed=config.run.seed,
        temperature=rollout.temperature,
        max_staleness=rollout.max_staleness,
        lmbda=0.0 if rollout.backend.type == "dataset" else rollout.lmbda,
        off_policy=rollout.off_policy,
        mask_truncated=rollout.mask_truncated_completions,
        replays=rollout.backend.type == "replay",
    )


def _aligner(
    config: RunConfig,
    found: Mapping[str, Pair],
    tokenizers: tuple[ChatTokenizer, Mapping[str, ChatTokenizer]],
    objective: Objective,
    topology: Topology,
) -> Aligner:
    section = config.distillation
    student, teachers = tokenizers
    payload = {
        name: payload_options(
            config,
            pair,
            student=student.vocabulary,
            teacher=teachers[name].vocabulary,
        )
        for name, pair in found.items()
    }
    return Aligner(
        student=student,
        teachers=teachers,
        payload=payload,
        objective=objective,
        options=AlignOptions(
            by_position=section.alignment == "position",
            canonical_prefix=section.positions == "canonical_prefix",
            shared_columns=section.shared_columns,
            max_over_replicas=lambda values: max_over_leads(topology, values),
        ),
    )


def _check_responses(config: RunConfig, prompts: Sequence[Prompt], pool: TeacherPool) -> None:
    if config.rollout.lmbda >= 1.0 or config.rollout.backend.type in ("replay", "dataset"):
        return
    from_data = config.rollout.off_policy == "dataset"
    writers = {name for name, teacher in pool.teachers.items() if isinstance(teacher, Writer)}
    for prompt in prompts:
        if not from_data and writers.isdisjoint(prompt.teachers):
            raise ConfigError(
                f"rollout.off_policy=teacher: no teacher of prompt {prompt.id} can write an "
                "answer; give one backend.type hf or vllm, or take off_policy=dataset"
            )
        if from_data and not prompt.response:
            raise ConfigError(
                f"rollout.lmbda={config.rollout.lmbda:g}: row {prompt.id} of data.path has no "
                "`response` to train on; add one, or take rollout.off_policy=teacher"
            )
