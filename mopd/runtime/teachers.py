"""The teachers of a recipe: the only place that names their classes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mopd.config.schema import RunConfig
from mopd.errors import ConfigError, TeacherError
from mopd.runtime.payloads import active_teachers
from mopd.serving.endpoint import Endpoint, EndpointOptions
from mopd.serving.replicas import Replicas, RetryOptions
from mopd.teachers.base import Teacher
from mopd.teachers.hf import HfTeacher, check_model
from mopd.teachers.pool import TeacherPool
from mopd.teachers.remote import RemoteOptions, RemoteTeacher, names_of
from mopd.teachers.uniform import UniformTeacher
from mopd.tokens.chat import ChatTokenizer


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
            teachers[name] = _teacher(
                config, name, tokenizers[name], student=student, device=device
            )
    except BaseException:
        TeacherPool(teachers).close()
        raise
    return TeacherPool(teachers)


def _teacher(
    config: RunConfig,
    name: str,
    tokenizer: ChatTokenizer,
    *,
    student: ChatTokenizer,
    device: torch.device,
) -> Teacher:
    section, top_k = config.teachers[name], config.distillation.top_k
    match section.backend.type:
        case "uniform":
            return UniformTeacher(name, tokenizer=tokenizer, student=student, top_k=top_k)
        case "custom":
            return custom(section.backend.target, config=config, tokenizer=tokenizer)
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
                top_k=top_k,
                temperature=config.distillation.temperature,
                batch_size=section.backend.batch_size,
            )
        case "vllm" | "openai":
            return _remote(config, name, tokenizer=tokenizer, student=student)
        case other:
            raise ConfigError(f"teachers.{name}.backend.type={other} is not available here")


def _remote(
    config: RunConfig, name: str, *, tokenizer: ChatTokenizer, student: ChatTokenizer
) -> RemoteTeacher:
    """For backend types vllm and openai; waits for the servers.

    Raises:
        ConfigError: a server that cannot be this teacher, before anything is trained.
    """
    backend, top_k = config.teachers[name].backend, config.distillation.top_k
    assert top_k is not None  # check_losses refuses it
    options = EndpointOptions(
        shape="openai" if backend.type == "openai" else "vllm",
        deadline_s=backend.deadline_s,
        max_outstanding=backend.max_outstanding,
        start_s=backend.start_s,
        api_key_env=backend.api_key_env,
        served_model=backend.served_model,
        names=names_of(tokenizer) if backend.type == "openai" else {},
    )
    retry = RetryOptions(
        max_outstanding=backend.max_outstanding,
        max_retries=backend.max_retries,
        restart_budget_s=backend.restart_budget_s,
    )
    endpoints = [Endpoint(url, options) for url in backend.urls]
    try:
        return RemoteTeacher(
            name,
            Replicas(name, endpoints, options=retry, seed=config.run.seed),
            tokenizer=tokenizer,
            student=student,
            options=RemoteOptions(
                top_k=top_k,
                tolerance=backend.tolerance,
                min_length=config.rollout.max_new_tokens,
                canary_interval=backend.canary_interval,
            ),
        )
    except TeacherError as error:
        raise ConfigError(str(error)) from error


def custom(target: str | None, **arguments: Any) -> Any:
    """``package.module:Name`` called with the recipe and the tokenizer."""
    module, _, name = (target or "").partition(":")
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"backend.target={target!r} cannot be imported: {error}") from error
    return factory(**arguments)
