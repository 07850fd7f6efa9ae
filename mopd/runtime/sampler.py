"""The sampler that a recipe names: with `build`, a place that names concrete classes."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

import numpy as np
import torch

from mopd.config.backends import RolloutBackendSection
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError
from mopd.rollout.base import Sampler
from mopd.rollout.colocate import ColocateSampler
from mopd.rollout.fleet import FleetOptions
from mopd.rollout.hf import HfSampler
from mopd.rollout.on_demand import OnDemandSampler
from mopd.rollout.replay import ReplaySampler
from mopd.rollout.tasks import Jobs, SamplingOptions
from mopd.rollout.vllm import SyncOptions, VllmSampler
from mopd.runtime.replica import gather_leads, sum_over_leads
from mopd.runtime.teachers import custom
from mopd.serving.sample_server import SampleServerOptions
from mopd.serving.sampling import MAX_DEADLINE_S
from mopd.serving.vllm_engine import LocalEngine
from mopd.student.parallel import Topology
from mopd.tokens.chat import ChatTokenizer

WEIGHTS_DIRECTORY = "weights"


def build_sampler(
    config: RunConfig, tokenizer: ChatTokenizer, topology: Topology, *, directory: Path
) -> Sampler | None:
    """On the lead of a replica; all leads call it together. None: nobody needs one.

    Raises:
        ConfigError: a stop token is none.
        SamplerError: a server is not there in time, or is not what is needed.
    """
    backend = config.rollout.backend
    if backend.type == "custom":
        return custom(backend.target, config=config, tokenizer=tokenizer)
    options = _options(config, tokenizer)
    model = Path(str(config.student.model))
    if backend.type == "vllm":
        jobs = Jobs(tokenizer, options)
        if backend.mode == "colocate":
            return ColocateSampler(_engine(config, model, topology.device), jobs=jobs)
        return _servers(backend, jobs, topology, directory=directory)

    def in_process() -> HfSampler:
        return sampler_here(config, tokenizer, topology.device)

    if backend.type == "dataset":
        return OnDemandSampler(in_process) if config.data.heldout_path else None
    live = in_process()
    if backend.type == "hf":
        return live
    return ReplaySampler(
        Path(str(backend.path)),
        tokenizer=tokenizer,
        num_generations=options.num_generations,
        live=live,
    )


def sampler_here(config: RunConfig, tokenizer: ChatTokenizer, device: torch.device) -> HfSampler:
    """A transformers copy of ``student.model`` here, whatever the recipe samples with."""
    return HfSampler(
        Path(str(config.student.model)),
        tokenizer=tokenizer,
        device=device,
        options=_options(config, tokenizer),
        batch_size=config.rollout.backend.batch_size,
    )


def _options(config: RunConfig, tokenizer: ChatTokenizer) -> SamplingOptions:
    rollout = config.rollout
    size = tokenizer.vocabulary.size
    for token in rollout.stop_token_ids:
        if token >= size or token == tokenizer.eos_id:
            what = "the end of the turn" if token < size else f"beyond its {size} tokens"
            raise ConfigError(
                f"rollout.stop_token_ids: {token} is {what} of the student's tokenizer; leave it "
                "out"
            )
    return SamplingOptions(
        seed=config.run.seed,
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        num_generations=rollout.num_generations_per_prompt,
        stop_token_ids=rollout.stop_token_ids,
        canonical=rollout.segmentation == "canonical",
    )


def _engine(config: RunConfig, model: Path, device: torch.device) -> LocalEngine:
    on_cpu = device.type == "cpu"
    return LocalEngine(
        model,
        dtype="float32" if on_cpu else config.student.dtype,
        memory_fraction=config.rollout.backend.memory_fraction,
        seed=config.run.seed,
        eager=on_cpu,
    )


def _servers(
    backend: RolloutBackendSection, jobs: Jobs, topology: Topology, *, directory: Path
) -> VllmSampler:
    root = directory / WEIGHTS_DIRECTORY
    if backend.sync_dir is not None:
        root = Path(backend.sync_dir)
    elif topology.dp_rank == 0:
        shutil.rmtree(root, ignore_errors=True)  # of a run that was killed
    update_s = min(max(backend.deadline_s, backend.start_s), MAX_DEADLINE_S)
    # one text for all replicas: their weights are the same
    session = gather_leads(topology, secrets.token_hex(8))[0]
    return VllmSampler(
        backend.urls,
        jobs=jobs,
        server=SampleServerOptions(
            deadline_s=backend.deadline_s,
            update_s=update_s,
            start_s=backend.start_s,
            max_outstanding=backend.max_outstanding,
            api_key_env=backend.api_key_env,
            served_model=backend.served_model,
        ),
        fleet=FleetOptions(
            max_outstanding=backend.max_outstanding,
            max_retries=backend.max_retries,
            restart_budget_s=backend.restart_budget_s,
            patience_s=update_s,
            tolerance=backend.probe_tolerance,
        ),
        sync=SyncOptions(
            mode=backend.weight_sync,
            session=session,
            pushes=topology.dp_rank == 0,
            directory=root,
            device=topology.device,
            barrier=lambda: sum_over_leads(topology, np.zeros(1)),
        ),
        batch_size=backend.batch_size,
    )
