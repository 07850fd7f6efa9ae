"""Mistakes that only show when sections are read together, found before any model is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from mopd.config.backends import RolloutBackendSection, TeacherBackendSection
from mopd.config.check_evaluate import check_evaluate
from mopd.config.check_inside import check_inside, check_inside_layout
from mopd.config.check_layout import check_layout
from mopd.config.check_logging import check_logging
from mopd.config.check_losses import check_losses
from mopd.config.check_rollout import check_rollout
from mopd.config.check_servers import (
    FOUND_KEYS,
    REMOTE_KEYS,
    check_reached,
    is_started,
    unread,
)
from mopd.config.check_started import check_started
from mopd.config.check_student import check_fit, check_student
from mopd.config.data_files import check_data, check_data_path
from mopd.config.keys import NAME, printable
from mopd.config.model_shape import find_model_config, read_model_config
from mopd.config.pools import actor_hint, check_pools, is_actor, teacher_owner
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError

FILL_IN = "or use launch/train.py, which fills in the embedded world"
TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
SERVER_TYPES = ("vllm", "mopd", "openai", "sglang", "trl")
NAMING_TYPES = ("vllm", "openai", "sglang")  # of these, the ones that list models by name
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_config(config: RunConfig, *, world_size: int, files: bool = True) -> None:
    """Raise ConfigError, one line with the key and the remedy, at the first mistake.

    Reads the file system (paths, config.json), no weights. Without ``files`` no path has to exist:
    of the models config.json alone is read, or that of `recipes/models`, and where the student's
    is not set, nothing.
    """
    problems = chain(
        _teachers(config),
        _backends(config),
        _launcher(config),
        check_started(config),
        check_pools(config),
        check_inside(config),
        check_rollout(config, world_size=world_size),
        check_losses(config),
        _schedule(config),
        check_evaluate(config),
        check_logging(config, installed=files),
        check_student(config, files=files),
        _paths(config) if files else (),
        check_data(config, files=files),
        _sizes(config, world_size),
        check_inside_layout(config, world_size=world_size),
    )
    problem = next(problems, None)
    if problem is not None:
        raise ConfigError(printable(problem))


def check_objective(config: RunConfig) -> None:
    """Raise ConfigError at the first mistake in the teachers and the losses alone."""
    problem = next(chain(_teachers(config), _backends(config), check_losses(config)), None)
    if problem is not None:
        raise ConfigError(printable(problem))


def _teachers(config: RunConfig) -> Iterator[str]:
    teachers = config.teachers
    if not teachers:
        yield "teachers: is empty; add one, as in teachers.math.model=<dir>"
        return
    for name in teachers:
        if not NAME.fullmatch(name):
            yield f"teachers.{name}: a name has letters, digits, `-` and `_` only; rename it"
    if all(teacher.weight == 0 for teacher in teachers.values()):
        yield "teachers.<name>.weight: all are 0, so nothing is learned; raise one"
    default = config.distillation.default_teacher
    if default in teachers and teachers[default].weight == 0:
        yield f"teachers.{default}.weight: is 0, but it is distillation.default_teacher; raise it"
    if default is not None and default not in teachers:
        yield (
            f"distillation.default_teacher: `{default}` is not a teacher; "
            f"choose one of {', '.join(teachers)}, or null"
        )


def _backends(config: RunConfig) -> Iterator[str]:
    yield from _target("rollout.backend", config.rollout.backend)
    for name, teacher in config.teachers.items():
        yield from _target(f"teachers.{name}.backend", teacher.backend)
        yield from _wire(config, teacher_owner(name), teacher.backend)
        yield from _servers(config, teacher_owner(name), teacher.backend)


def _launcher(config: RunConfig) -> Iterator[str]:
    """The other keys of `ray` say nothing about where a run is, so both launchers accept them."""
    if config.launcher != "ray" and config.ray.address is not None:
        yield "ray.address: is only read by launcher=ray; set that, or leave the key out"


def _target(prefix: str, backend: TeacherBackendSection | RolloutBackendSection) -> Iterator[str]:
    target = backend.target
    if backend.type != "custom":
        if target is not None:
            yield f"{prefix}.target: is only read by type=custom; set that type, or target=null"
    elif target is None:
        yield f"{prefix}.target: is not set; type=custom needs package.module:Name"
    elif not TARGET.fullmatch(target):
        yield f"{prefix}.target: expected package.module:Name, got `{target}`"


def _wire(config: RunConfig, owner: str, backend: TeacherBackendSection) -> Iterator[str]:
    prefix = f"{owner}.backend"
    if backend.type != "mopd" and backend.wire != "fp32" and not is_actor(config, owner):
        readers = f"type=mopd{actor_hint(config, owner)}"
        yield f"{prefix}.wire: is only read by {readers}; set that, or wire=fp32"
    if backend.served_model is not None and backend.type in ("mopd", "trl"):
        kinds = ", ".join(NAMING_TYPES)
        yield f"{prefix}.served_model: type={backend.type} names no models ({kinds} do); drop it"


def _servers(config: RunConfig, owner: str, backend: TeacherBackendSection) -> Iterator[str]:
    prefix = f"{owner}.backend"
    if backend.type != "hf":
        yield from unread(prefix, backend, ("batch_size",), "type=hf")
    readers = f"type={' or '.join(SERVER_TYPES)}"
    if is_actor(config, owner):
        yield from unread(prefix, backend, FOUND_KEYS, readers)
        # the server in the actor scores as many texts together as fit
        yield from unread(prefix, backend, ("batch_size",), f"type=hf with {owner}.pool=student")
        return
    if backend.type not in SERVER_TYPES:
        keys = (*REMOTE_KEYS, "entries_per_request", "tolerance", "canary_interval")
        yield from unread(prefix, backend, keys, readers + actor_hint(config, owner))
        return
    if not backend.urls and not is_started(backend):
        yield f"{prefix}.urls: is empty; add a server, as in [http://127.0.0.1:8000]"
    yield from check_reached(prefix, backend)
    if config.distillation.temperature != 1.0 and backend.type != "mopd":
        yield (
            f"distillation.temperature={config.distillation.temperature:g}: {prefix}.type="
            f"{backend.type} sends no log-sum-exp; set temperature to 1, or type=hf or mopd"
        )


def _schedule(config: RunConfig) -> Iterator[str]:
    optimizer = config.student.optimizer
    total = optimizer.lr_warmup_fraction + optimizer.lr_decay_fraction
    if total > 1.0:
        yield (
            f"student.optimizer: lr_warmup_fraction + lr_decay_fraction = {total:g} is more than "
            "the whole run; lower one of them"
        )
    dumped, steps = config.debug.dump_step, config.train.steps
    if dumped is not None and dumped >= steps:
        yield (
            f"debug.dump_step={dumped}: train.steps={steps} ends before it (the last step is "
            f"{steps - 1}); lower it, or train longer"
        )


def _paths(config: RunConfig) -> Iterator[str]:
    student = config.student
    yield from _model_dir("student.model", student.model)
    tokenizer_key = "student.tokenizer" if student.tokenizer else "student.model"
    yield from _tokenizer_dir(tokenizer_key, student.tokenizer or student.model)
    for name, teacher in config.teachers.items():
        key = f"teachers.{name}"
        if teacher.backend.type == "self":  # has the student's
            continue
        if teacher.backend.type in ("hf", "megatron") or is_started(teacher.backend):
            yield from _model_dir(f"{key}.model", teacher.model)
        tokenizer_key = f"{key}.tokenizer" if teacher.tokenizer else f"{key}.model"
        yield from _tokenizer_dir(tokenizer_key, teacher.tokenizer or teacher.model)
        if teacher.projection_matrix_path is not None:
            yield from _file(f"{key}.projection_matrix_path", teacher.projection_matrix_path)
    if config.data.path is None:
        yield f"data.path: is not set; set it, {FILL_IN}"
    yield from check_data_path("data.path", config.data.path)
    yield from check_data_path("data.heldout_path", config.data.heldout_path)
    if config.rollout.backend.path is not None and not Path(config.rollout.backend.path).exists():
        yield f"rollout.backend.path: {config.rollout.backend.path} does not exist; correct it"


def _model_dir(key: str, model: str | None) -> Iterator[str]:
    if model is None:
        yield f"{key}: is not set; set it to a Hugging Face directory, {FILL_IN}"
    elif not Path(model).is_dir():
        yield f"{key}: {model} is not a directory; download the model and give its directory"
    elif not (Path(model) / "config.json").is_file():
        yield f"{key}: {model} has no config.json; give a Hugging Face model directory"


def _tokenizer_dir(key: str, tokenizer: str | None) -> Iterator[str]:
    if tokenizer is None:
        yield f"{key}: is not set; set it to a Hugging Face directory, {FILL_IN}"
    elif not any((Path(tokenizer) / name).is_file() for name in TOKENIZER_FILES):
        yield (
            f"{key}: {tokenizer} has no tokenizer ({' or '.join(TOKENIZER_FILES)}); "
            f"set {key.rpartition('.')[0]}.tokenizer to a directory that has one"
        )


def _file(key: str, path: str) -> Iterator[str]:
    if not Path(path).is_file():
        yield f"{key}: {path} is not a file; correct it"


def _sizes(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel = config.student.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    if world_size % (tp * pp * cp):
        yield (
            f"student.parallel: tensor {tp} x pipeline {pp} x context {cp} = {tp * pp * cp} does "
            f"not divide the world size {world_size}; start a multiple of {tp * pp * cp} ranks"
        )
        return
    yield from _batch_split(config, data_parallel=world_size // (tp * pp * cp))
    if config.student.model is None:  # `_paths`, where files are looked at
        return
    shape = read_model_config(find_model_config(config.student.model).parent)
    yield from check_layout(shape, parallel, world_size)
    yield from check_fit(config.student, shape)


def _batch_split(config: RunConfig, *, data_parallel: int) -> Iterator[str]:
    prompts = config.train.num_prompts_per_step
    if prompts % data_parallel:
        fitting = -(-prompts // data_parallel) * data_parallel
        yield (
            f"train.num_prompts_per_step={prompts} is not divisible by the data-parallel size "
            f"{data_parallel}; {fitting} would fit"
        )
