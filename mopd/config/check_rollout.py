"""Mistakes in how a recipe samples, found before anything is started. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator

from mopd.config.backends import RolloutBackendSection
from mopd.config.schema import RunConfig
from mopd.config.urls import checked_url

DEFAULTS = RolloutBackendSection()
SERVER_KEYS = ("urls", "served_model", "api_key_env", "weight_sync", "sync_dir")
LOWEST_TEMPERATURE = 0.01  # of vLLM, which raises what is below


def check_rollout(config: RunConfig, *, world_size: int) -> Iterator[str]:
    """Problems of `rollout`, one line each with the key and the remedy."""
    rollout, prefix = config.rollout, "rollout.backend"
    backend = rollout.backend
    if backend.type == "replay" and backend.path is None:
        yield f"{prefix}.path: is not set; a replay needs the journal of another run"
    if backend.type != "replay" and backend.path is not None:
        yield f"{prefix}.path: is only read by type=replay; set that type, or path=null"
    if len(set(rollout.stop_token_ids)) < len(rollout.stop_token_ids):
        yield "rollout.stop_token_ids: lists a token twice; give each once"
    if backend.type != "vllm":
        for key in ("mode", *SERVER_KEYS):
            if getattr(backend, key) != getattr(DEFAULTS, key):
                yield f"{prefix}.{key}: is only read by type=vllm; set that type, or leave it out"
        return
    if rollout.temperature < LOWEST_TEMPERATURE:
        yield f"rollout.temperature: vLLM samples at {LOWEST_TEMPERATURE:g} or more; raise it"
    if backend.mode == "colocate":
        yield from _colocate(backend, prefix, world_size=world_size)
    else:
        yield from _servers(backend, prefix)


def _colocate(backend: RolloutBackendSection, prefix: str, *, world_size: int) -> Iterator[str]:
    for key in SERVER_KEYS:
        if getattr(backend, key) != getattr(DEFAULTS, key):
            yield f"{prefix}.{key}: is only read by mode=server; set that mode, or leave it out"
    if world_size > 1:
        yield (
            f"{prefix}.mode=colocate: vLLM in this process works for a job of one rank, and this "
            f"one has {world_size}; use mode=server"
        )


def _servers(backend: RolloutBackendSection, prefix: str) -> Iterator[str]:
    if len(set(backend.urls)) < len(backend.urls):
        yield f"{prefix}.urls: lists a server twice; give each replica once"
    for url in backend.urls:
        try:
            checked_url(url)
        except ValueError as error:
            yield f"{prefix}.urls: {url.rpartition('@')[2]} {error}"
    if backend.weight_sync != "files" and backend.sync_dir is not None:
        yield f"{prefix}.sync_dir: is only read by weight_sync=files; leave it out"
    variable = backend.api_key_env
    if variable is not None and not os.environ.get(variable):
        yield f"{prefix}.api_key_env: the environment variable {variable} is not set; set it"
