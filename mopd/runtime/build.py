"""The composition root: with `objective`, the only place that names concrete classes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from mopd.config.model_shape import read_model_config
from mopd.config.schema import RunConfig
from mopd.device import check_dtype, get_device
from mopd.errors import ConfigError
from mopd.metrics.announced import announced
from mopd.metrics.span import Spans
from mopd.rollout.base import Sampler
from mopd.runtime.build_feed import build_eval_feed, build_feed
from mopd.runtime.data import Router, check_answers, check_chats, check_measurable, read_prompts
from mopd.runtime.eval_feed import EvalFeed
from mopd.runtime.feed import Feed
from mopd.runtime.inside import InsideTeachers, build_engines
from mopd.runtime.learned import learned_companions
from mopd.runtime.parts import Tokenizers, build_head, load_pairs, load_tokenizers
from mopd.runtime.payloads import Pair
from mopd.runtime.reached import ServerSource
from mopd.runtime.sampler import build_sampler
from mopd.runtime.student_turns import StudentTurns
from mopd.runtime.teachers import build_pool
from mopd.student.away import StudentState
from mopd.student.model import StudentModel, build_student
from mopd.student.optim import build_optimizer
from mopd.student.parallel import TIMEOUT, Topology, initialize
from mopd.student.step import Student
from mopd.teachers.pool import TeacherPool
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt

SMALL_HIDDEN_SIZE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything the loop needs. ``sampler``, ``pool``, ``feed`` and ``eval_feed`` exist on lead
    ranks only, and ``sampler`` only where somebody asks it.

    ``finished`` is called after every step and every part of an evaluation, ``stop_asked`` after
    every step: whether this rank was told to save and end. ``activity`` is told what takes a while
    beside the steps: what, how many are done, of how many, and of what.
    """

    config: RunConfig
    directory: Path
    topology: Topology
    student: Student
    pairs: Mapping[str, Pair]
    tokenizer: ChatTokenizer
    sampler: Sampler | None
    pool: TeacherPool | None
    feed: Feed | None
    eval_feed: EvalFeed | None
    inside: InsideTeachers
    heldout: list[Prompt]
    validation: list[Prompt]
    spans: Spans
    servers: ServerSource
    turns: StudentTurns
    finished: Callable[[], None] = lambda: None
    stop_asked: Callable[[], bool] = lambda: False
    activity: Callable[[str, int, int, str], None] = lambda what, done, total, unit: None


def build_run(config: RunConfig, servers: ServerSource) -> Run:
    """Joins the process group and builds this rank's parts. Collective over all ranks.

    Raises:
        ConfigError: before any model is loaded where the data or a tokenizer is wrong.
    """
    with ExitStack() as opened:  # what a start that fails leaves behind
        opened.callback(servers.close)
        run = _build_run(config, servers, opened)
        opened.pop_all()
    return run


def _build_run(config: RunConfig, servers: ServerSource, opened: ExitStack) -> Run:
    backend = get_device(config.run.device)
    check_dtype(backend, config.student.dtype)
    torch.set_num_threads(config.run.threads or threads_per_rank(config))
    router = Router(config.teachers, config.distillation)
    assert config.data.path is not None and config.student.model is not None
    with announced("reading the data"):
        data = read_data(config, router)
    with announced("loading the tokenizers"):
        tokenizers = load_tokenizers(config)
    for key, rows in data.items():
        check_chats(
            key, rows, config=config, student=tokenizers.student, teachers=tokenizers.teachers
        )
    directory = Path(config.run.dir) / config.run.name
    turns = StudentTurns(config, directory=directory)
    opened.callback(turns.close)
    patience = _patience(config)
    with announced("waiting for the other ranks"):
        topology = initialize(
            config.student.parallel, backend=backend, seed=config.run.seed, timeout=patience
        )
    servers.start(directory, device=backend.name)  # they load while the student is built
    found = load_pairs(config, tokenizers, topology)
    with announced("loading the student"):
        model = build_student(config.student, topology=topology, seed=config.run.seed)
        student = _student(config, model, tokenizers, found)
    with announced("loading the teachers on the student's ranks"):
        engines = build_engines(config, model, tokenizers.teachers)
    turns.begin(StudentState(model, student.optimizer), topology)
    with announced("waiting for the servers to be healthy (their logs: servers/ of the run)"):
        config = servers.reach()
    sampler = pool = feed = eval_feed = None
    spans = Spans()
    if topology.is_lead:
        sampler, pool = _engines(config, tokenizers, topology, directory, opened)
        feed = build_feed(
            config,
            found,
            prompts=data["data.path"],
            sampler=sampler,
            pool=pool,
            tokenizers=(tokenizers.student, tokenizers.teachers),
            run=(topology, spans, directory),
        )
        eval_feed = build_eval_feed(
            config,
            found,
            domains={
                prompt.domain
                for prompt in (*data["data.heldout_path"], *data["data.validation_path"])
            },
            sampler=sampler,
            pool=pool,
            tokenizers=(tokenizers.student, tokenizers.teachers),
            topology=topology,
        )
    inside = InsideTeachers(
        engines, topology=topology, teachers=pool.teachers if pool else {}, spans=spans
    )
    with announced("checking the teachers on the student's ranks"), turns.turn():
        inside.check()
    return Run(
        config=config,
        directory=directory,
        topology=topology,
        student=student,
        pairs=found,
        tokenizer=tokenizers.student,
        sampler=sampler,
        pool=pool,
        feed=feed,
        eval_feed=eval_feed,
        inside=inside,
        heldout=data["data.heldout_path"],
        validation=data["data.validation_path"],
        spans=spans,
        servers=servers,
        turns=turns,
    )


def _engines(
    config: RunConfig,
    tokenizers: Tokenizers,
    topology: Topology,
    directory: Path,
    opened: ExitStack,
) -> tuple[Sampler | None, TeacherPool]:
    """Of a lead: its sampler, if somebody asks one, and its teachers; ``opened`` closes them."""
    with announced("preparing the sampler"):
        sampler = build_sampler(config, tokenizers.student, topology, directory=directory)
    if sampler is not None:
        opened.callback(sampler.close)
    with announced("preparing the teachers"):
        pool = build_pool(
            config, tokenizers.teachers, student=tokenizers.student, device=topology.device
        )
    opened.callback(pool.close)
    return sampler, pool


def _patience(config: RunConfig) -> timedelta:
    """Of ranks with each other: where there is a watchdog, it is the one that speaks first."""
    stall = timedelta(seconds=config.run.stall_s) + timedelta(minutes=1)
    return max(TIMEOUT, stall if config.run.stall_s else timedelta(weeks=1))


def threads_per_rank(config: RunConfig) -> int:
    """An even share of the cores; one for a small student, whose threads would only wait."""
    if read_model_config(Path(str(config.student.model))).hidden_size <= SMALL_HIDDEN_SIZE:
        return 1
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, (os.cpu_count() or 1) // local_world)


def read_data(config: RunConfig, router: Router) -> dict[str, list[Prompt]]:
    """Rows by the key of their path; none where it is not set.

    Raises:
        ConfigError: a row that cannot be used, with its file and line.
    """
    from_data = config.rollout.backend.type == "dataset"
    mixed = config.rollout.lmbda < 1.0 and config.rollout.off_policy == "dataset"
    answered = {
        "data.path": from_data or mixed,
        "data.heldout_path": False,
        "data.validation_path": True,
    }
    required = ["data.validation_path", *(["data.path"] if from_data else [])]
    found: dict[str, list[Prompt]] = {}
    for key, has_answers in answered.items():
        path = getattr(config.data, key.removeprefix("data."))
        found[key] = []
        if path is not None:
            found[key] = read_prompts(
                path,
                router=router,
                teacher_key=config.distillation.teacher_key,
                data=config.data,
                answered=has_answers,
                cache=Path(config.cache_dir) / "datasets",
            )
        if key in required:
            check_answers(key, found[key], data=config.data)
    check_measurable(config, found["data.heldout_path"])
    return found


def _student(
    config: RunConfig,
    model: StudentModel,
    tokenizers: Tokenizers,
    found: Mapping[str, Pair],
) -> Student:
    vocab_size = tokenizers.student.vocabulary.size
    if vocab_size > model.vocab_size:
        raise ConfigError(
            f"student.tokenizer has {vocab_size} tokens and student.model only {model.vocab_size}; "
            "name the tokenizer that belongs to the model"
        )
    head = build_head(
        config,
        tokenizers,
        found,
        topology=model.topology,
        padded_vocab_size=model.padded_vocab_size,
    )
    optimizer, scheduler = build_optimizer(
        config.student.optimizer, model=model, total_steps=config.train.steps
    )
    return Student(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        loss_function=head,
        clip_grad=config.student.optimizer.clip_grad,
        fused_head=config.student.fused_head,
        companions=learned_companions(config, head.terms, found),
        # opd looks from a token to the ones behind it, and at whole answers
        share_by="sequence" if "opd" in {pair.loss for pair in found.values()} else "chunk",
    )
