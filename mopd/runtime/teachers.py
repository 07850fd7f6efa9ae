"""The teachers of a recipe: the only place that names their classes."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mopd.config.backends import TeacherBackendSection
from mopd.config.schema import PrivilegedSection, RunConfig
from mopd.errors import ConfigError, TeacherError
from mopd.metrics.text import replace_file
from mopd.runtime.payloads import active_teachers
from mopd.serving.endpoint import Endpoint, EndpointOptions
from mopd.serving.protocols import (
    MopdRows,
    OpenAiEcho,
    ServerProtocol,
    Sglang,
    Trl,
    VllmCompletions,
    VllmGenerate,
)
from mopd.serving.replicas import Replicas
from mopd.serving.retry import RetryOptions
from mopd.teachers.base import Bounded, Known, Teacher, teacher_messages
from mopd.teachers.hf import HfOptions, HfTeacher, check_model
from mopd.teachers.inside import InsideOptions, InsideTeacher
from mopd.teachers.pool import TeacherPool
from mopd.teachers.remote import RemoteOptions, RemoteTeacher, names_of
from mopd.teachers.uniform import UniformTeacher
from mopd.teachers.writing import WritingTeacher
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Message, Prompt

LOOKED_AT = 64  # prompts that are cut into tokens, the longest or the shortest by characters


def build_pool(
    config: RunConfig,
    tokenizers: Mapping[str, ChatTokenizer],
    *,
    student: ChatTokenizer,
    device: torch.device,
) -> TeacherPool:
    """Every teacher that weighs something, loaded or reached.

    Raises:
        ConfigError: a server that cannot be its teacher.
    """
    teachers: dict[str, Teacher] = {}
    try:
        for name in active_teachers(config):
            teachers[name] = build_teacher(
                config, name, tokenizers[name], student=student, device=device
            )
    except BaseException:
        TeacherPool(teachers).close()
        raise
    return TeacherPool(teachers, top_k=config.distillation.top_k)


def context_warnings(
    config: RunConfig, pool: TeacherPool, prompts: Sequence[Prompt]
) -> Iterator[str]:
    """One line for each teacher whose context may end before an answer does.

    Of many prompts the longest `LOOKED_AT` are counted, and as many of the shortest decide whether
    any of them fits.

    Raises:
        ConfigError: no prompt leaves a teacher room for one token of an answer.
    """
    most = config.rollout.max_new_tokens
    for name, teacher in pool.teachers.items():
        limit = teacher.max_length if isinstance(teacher, Bounded) else None
        if limit is None:
            continue
        privileged = config.teachers[name].privileged
        chats = sorted(
            (teacher_messages(prompt, privileged) for prompt in prompts if name in prompt.teachers),
            key=_characters,
        )
        longest = [len(teacher.tokenizer.prompt_ids(chat)) for chat in chats[-LOOKED_AT:]]
        long = sum(size + most > limit for size in longest)
        if not long:
            continue
        if all(len(teacher.tokenizer.prompt_ids(chat)) >= limit for chat in chats[:LOOKED_AT]):
            raise ConfigError(
                f"teachers.{name}: reads {limit} tokens, and no prompt of data.path leaves room "
                "for one token of an answer; take a model or a server with a longer context, or "
                "shorter prompts"
            )
        at_least = "at least " if long == LOOKED_AT < len(chats) else ""
        yield (
            f"teachers.{name}: reads {limit} tokens, and {at_least}{long} of {len(chats)} prompts "
            f"with an answer of rollout.max_new_tokens={most} have more (the longest prompt: "
            f"{max(longest)}); what is beyond is not scored (missing/{name}/context)"
        )


def _characters(chat: Sequence[Message]) -> int:
    return sum(len(message["content"]) for message in chat)


def build_teacher(
    config: RunConfig,
    name: str,
    tokenizer: ChatTokenizer,
    *,
    student: ChatTokenizer,
    device: torch.device,
) -> Teacher:
    """One teacher, loaded or reached and tested.

    Raises:
        ConfigError: it cannot be the teacher that the recipe means.
    """
    section, top_k = config.teachers[name], config.distillation.top_k
    _check_privileged(name, section.privileged, tokenizer)
    match section.backend.type:
        case "uniform":
            return UniformTeacher(name, tokenizer=tokenizer, student=student, top_k=top_k)
        case "custom":
            return custom(section.backend.target, config=config, tokenizer=tokenizer)
        case "megatron" | "self":
            return _inside(config, name, tokenizer=tokenizer, student=student)
        case "hf":
            check_model(
                name,
                Path(str(section.model)),
                tokenizer=tokenizer,
                min_length=config.rollout.max_new_tokens,
            )
            return HfTeacher(
                name,
                Path(str(section.model)),
                tokenizer=tokenizer,
                student=student,
                device=device,
                options=HfOptions(
                    top_k=top_k,
                    temperature=config.distillation.temperature,
                    batch_size=section.backend.batch_size,
                    privileged=section.privileged,
                ),
            )
        case "vllm" | "mopd" | "openai" | "sglang" | "trl":
            return _remote(config, name, tokenizer=tokenizer, student=student)


def _inside(
    config: RunConfig, name: str, *, tokenizer: ChatTokenizer, student: ChatTokenizer
) -> InsideTeacher:
    """The lead's half; the weights are those of `mopd.runtime.inside.build_engines`."""
    section = config.teachers[name]
    own = section.backend.type == "megatron"
    model_dir = Path(str(section.model if own else config.student.model))
    check_model(name, model_dir, tokenizer=tokenizer, min_length=config.rollout.max_new_tokens)
    return InsideTeacher(
        name,
        model_dir,
        tokenizer=tokenizer,
        student=student,
        options=InsideOptions(
            top_k=config.distillation.top_k,
            temperature=config.distillation.temperature,
            privileged=section.privileged,
        ),
    )


def _remote(
    config: RunConfig, name: str, *, tokenizer: ChatTokenizer, student: ChatTokenizer
) -> RemoteTeacher:
    """For the backend types with servers; waits for them.

    Raises:
        ConfigError: a server that cannot be this teacher, before anything is trained.
    """
    section, top_k = config.teachers[name], config.distillation.top_k
    backend = section.backend
    if top_k is None:
        _check_whole_rows(config, name, vocab_size=tokenizer.vocabulary.size)
    options = EndpointOptions(
        protocols=protocols(backend, tokenizer),
        temperature=config.distillation.temperature,
        deadline_s=backend.deadline_s,
        max_outstanding=backend.max_outstanding,
        start_s=backend.start_s,
        api_key_env=backend.api_key_env,
        served_model=backend.served_model,
    )
    retry = RetryOptions(
        max_outstanding=backend.max_outstanding,
        max_retries=backend.max_retries,
        restart_budget_s=backend.restart_budget_s,
        entries_per_request=backend.entries_per_request,
    )
    endpoints = [Endpoint(url, options) for url in backend.urls]
    try:
        kind = WritingTeacher if backend.type in ("vllm", "mopd") else RemoteTeacher
        return kind(
            name,
            Replicas(name, endpoints, options=retry, seed=config.run.seed),
            tokenizer=tokenizer,
            student=student,
            options=RemoteOptions(
                top_k=top_k,
                tolerance=backend.tolerance,
                min_length=config.rollout.max_new_tokens,
                canary_interval=backend.canary_interval,
                privileged=section.privileged,
            ),
        )
    except TeacherError as error:
        raise ConfigError(str(error)) from error


def protocols(
    backend: TeacherBackendSection, tokenizer: ChatTokenizer
) -> tuple[ServerProtocol, ...]:
    """What servers of a type speak, the better first."""
    match backend.type:
        case "mopd":
            return (MopdRows(vocab_size=tokenizer.vocabulary.size, wire=backend.wire),)
        case "openai":
            return (OpenAiEcho(names_of(tokenizer)),)
        case "sglang":
            return (Sglang(),)
        case "trl":
            return (Trl(),)
        case _:
            return (VllmGenerate(), VllmCompletions())


def _check_whole_rows(config: RunConfig, name: str, *, vocab_size: int) -> None:
    """Raises ConfigError when a step's rows would not pass through a network in reasonable time.

    Counted are answers as long as they may be, in float32.
    """
    rollout, limit = config.rollout, config.distillation.max_remote_gb_per_step
    answers = config.train.num_prompts_per_step * rollout.num_generations_per_prompt
    size = answers * rollout.max_new_tokens * vocab_size * 4
    if size > limit * 1e9:
        # transformers in an actor are spoken to as servers are
        pool = f" (with teachers.{name}.pool=student)" if config.launcher == "ray" else ""
        raise ConfigError(
            f"distillation.top_k: null asks teachers.{name} for up to {size / 1e9:.3g} GB of whole "
            f"rows a step, over distillation.max_remote_gb_per_step={limit:g}; give top_k a "
            f"number, or set teachers.{name}.backend.type=megatron or hf{pool}"
        )


def _check_privileged(name: str, section: PrivilegedSection, tokenizer: ChatTokenizer) -> None:
    """Raises ConfigError when the teacher's template has no place for its system message."""
    if section.system is None:
        return
    user = {"role": "user", "content": "x"}
    system = {"role": "system", "content": section.system}
    try:
        with_it = tokenizer.prompt_ids([system, user])
    except ConfigError as error:
        raise ConfigError(
            f"teachers.{name}.privileged.system: its chat template refuses a system message "
            f"({error.__cause__ or error}); use privileged.prefix"
        ) from error
    if with_it.tolist() == tokenizer.prompt_ids([user]).tolist():
        raise ConfigError(
            f"teachers.{name}.privileged.system: its chat template leaves a system message out; "
            "use privileged.prefix"
        )


def recognise(directory: Path, teachers: Mapping[str, Teacher]) -> None:
    """Notes who the teachers of a run are, and refuses to go on with others.

    Raises:
        ConfigError: a teacher is not the one that the run began with.
    """
    path = directory / "teachers.json"
    known = {name: one for name, one in teachers.items() if isinstance(one, Known)}
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, teacher in known.items():
        if name in before and (problem := teacher.differs(before[name])):
            raise ConfigError(
                f"teachers.{name}: is not the teacher that {directory} began with: it {problem}; "
                "start the same model, or train under another run.name"
            )
    found = {name: teacher.identity() for name, teacher in known.items()}
    replace_file(path, json.dumps(found | before) + "\n")


def custom(target: str | None, **arguments: Any) -> Any:
    """``package.module:Name`` called with the recipe and the tokenizer."""
    module, _, name = (target or "").partition(":")
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"backend.target={target!r} cannot be imported: {error}") from error
    return factory(**arguments)
