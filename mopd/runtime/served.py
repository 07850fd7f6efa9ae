"""What the servers of a recipe serve, and how one of them is started. No torch."""

from __future__ import annotations

import os
from pathlib import Path

from mopd.config.backends import RemoteSection
from mopd.config.check_servers import is_started
from mopd.config.pools import ROLLOUT, backends_of, pools_of, shared_pool_of
from mopd.config.schema import RunConfig
from mopd.environment import VISIBLE_DEVICES
from mopd.runtime.nodes import Engine
from mopd.serving.launch import Launch, find_python
from mopd.serving.lease import lease_environment, lease_path
from mopd.serving.vllm_command import (
    ServedModel,
    started_environment,
    started_words,
)

FOLDER, IMPORTS = "servers", "python"  # in a run's directory: logs, and what they import


def started_sections(config: RunConfig) -> dict[str, RemoteSection]:
    """Sections whose servers mopd starts, by their owner: rollout, teachers.math."""
    backends = backends_of(config)
    return {owner: backends[owner] for owner in pools_of(config) if is_started(backends[owner])}


def server_launch(
    config: RunConfig,
    engine: Engine,
    *,
    host: str,
    port: int,
    key: str,
    folder: Path,
    imports: Path,
) -> Launch:
    """How the server of ``engine`` is started in this process's environment.

    Args:
        host: the address that it listens on, which is this host's.
        key: of the run; who lacks it is refused.
        folder: of the logs, in the run's directory.
        imports: `serving.launch.importable`, on this host.
    Raises:
        ConfigError: no interpreter here has vLLM.
    """
    section = started_sections(config)[engine.owner]
    python = find_python(f"{engine.owner}.backend", section.server.python, os.environ)
    base = dict(os.environ)
    if engine.hides_devices:
        base |= dict.fromkeys(VISIBLE_DEVICES.values(), "")
    return Launch(
        owner=engine.owner,
        words=(python, *started_words(served_model(config, engine), host=host, port=port)),
        environment=started_environment(
            base, token=key, imports=imports, device=engine.device, devices=engine.devices
        )
        | turns_environment(config, engine.owner, directory=folder.parent),
        host=host,
        port=port,
        log=folder / f"{engine.owner}-{engine.number}.log",
        max_restarts=section.server.max_restarts,
    )


def served_model(config: RunConfig, engine: Engine) -> ServedModel:
    """What a server serves.

    A teacher scores in vLLM's choice of a type; the sampler's weights are the student's, and so is
    their type.
    """
    is_small = engine.device == "cpu"
    if engine.owner == ROLLOUT:
        model, tokenizer = config.student.model, config.student.tokenizer
        section: RemoteSection = config.rollout.backend
        dtype = config.student.dtype
        top_k = None
    else:
        teacher = config.teachers[engine.owner.partition(".")[2]]
        model, tokenizer, section = teacher.model, teacher.tokenizer, teacher.backend
        dtype = "float32" if is_small else None
        top_k = config.distillation.top_k
    assert model is not None  # check_config
    return ServedModel(
        model=Path(model).absolute(),
        tokenizer=None if tokenizer is None else str(Path(tokenizer).absolute()),
        name=section.served_model or engine.owner,
        max_logprobs=top_k,
        processed_logprobs=engine.owner == ROLLOUT,
        dtype=dtype,
        is_small=is_small,
        takes_turns=shared_pool_of(config, engine.owner) is not None,
        more=section.server.args,
        tensor_parallel_size=section.server.tensor_parallel_size,
    )


def turns_environment(config: RunConfig, owner: str, *, directory: Path) -> dict[str, str]:
    """For the servers of ``owner``: the lease of their pool on this host, where they share it.

    Args:
        directory: of the run.
    """
    pool = shared_pool_of(config, owner)
    return {} if pool is None else lease_environment(lease_path(directory, pool), owner=owner)
