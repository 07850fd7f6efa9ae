"""Mistakes in how a recipe samples, found before anything is started. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from mopd.config.backends import RolloutBackendSection
from mopd.config.check_servers import FOUND_KEYS, REMOTE_KEYS, check_reached, unread
from mopd.config.pools import ROLLOUT, actor_hint, is_actor
from mopd.config.schema import RunConfig

SERVER_KEYS = (*REMOTE_KEYS, "weight_sync", "sync_dir")
WRITERS = ("hf", "vllm", "mopd", "custom")  # teachers that write answers, or may
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
    if rollout.segmentation == "canonical" and backend.type != "hf":
        yield (
            "rollout.segmentation=canonical: the sampler in process rules tokens out, "
            f"rollout.backend.type={backend.type} does not; set type=hf, or segmentation=any"
        )
    yield from _authors(config)
    if backend.type == "dataset":
        yield from _dataset(config)
    if backend.type == "custom":
        yield from unread(prefix, backend, ("batch_size",), "type=hf, vllm or replay")
    if is_actor(config, ROLLOUT):
        yield from unread(prefix, backend, ("mode", *FOUND_KEYS, "memory_fraction"), "type=vllm")
        yield from _sync(backend, prefix)
        return
    if backend.type != "vllm":
        yield from unread(prefix, backend, ("mode", "memory_fraction"), "type=vllm")
        readers = f"type=vllm{actor_hint(config, ROLLOUT)}"
        yield from unread(prefix, backend, SERVER_KEYS, readers)
        return
    if rollout.temperature < LOWEST_TEMPERATURE:
        yield f"rollout.temperature: vLLM samples at {LOWEST_TEMPERATURE:g} or more; raise it"
    if backend.mode == "colocate":
        yield from _colocate(backend, prefix, world_size=world_size)
    else:
        yield from _servers(backend, prefix)


def _colocate(backend: RolloutBackendSection, prefix: str, *, world_size: int) -> Iterator[str]:
    yield from unread(prefix, backend, (*SERVER_KEYS, "batch_size"), "mode=server")
    if world_size > 1:
        yield (
            f"{prefix}.mode=colocate: vLLM in this process works for a job of one rank, and this "
            f"one has {world_size}; use mode=server"
        )


def _servers(backend: RolloutBackendSection, prefix: str) -> Iterator[str]:
    yield from unread(prefix, backend, ("memory_fraction",), "mode=colocate")
    yield from check_reached(prefix, backend)
    yield from _sync(backend, prefix)


def _sync(backend: RolloutBackendSection, prefix: str) -> Iterator[str]:
    if backend.weight_sync != "files" and backend.sync_dir is not None:
        yield f"{prefix}.sync_dir: is only read by weight_sync=files; leave it out"


def _dataset(config: RunConfig) -> Iterator[str]:
    """Keys of sampling that contradict answers from the data."""
    rollout = config.rollout
    if 0.0 < rollout.lmbda < 1.0:
        yield (
            f"rollout.lmbda={rollout.lmbda:g}: with rollout.backend.type=dataset no answer is "
            "sampled; leave it out, or set type=hf for a mix"
        )
    if rollout.off_policy != "dataset":
        yield (
            f"rollout.off_policy={rollout.off_policy}: rollout.backend.type=dataset takes answers "
            "from the data; set type=hf with lmbda=0 for answers of teachers"
        )
    if rollout.temperature != 1.0:
        yield (
            f"rollout.temperature={rollout.temperature:g}: with rollout.backend.type=dataset "
            "nothing is sampled (evaluations are greedy); leave it out"
        )
    if rollout.num_generations_per_prompt > 1:
        yield (
            f"rollout.num_generations_per_prompt={rollout.num_generations_per_prompt}: the data "
            "has one answer a row; set 1, or another rollout.backend.type"
        )


def _authors(config: RunConfig) -> Iterator[str]:
    """What can be told without the data: no teacher at all is of a type that writes."""
    rollout = config.rollout
    if rollout.lmbda >= 1.0 or rollout.off_policy != "teacher":
        return
    if rollout.backend.type in ("replay", "dataset"):  # they have the answers
        return
    if not any(t.backend.type in WRITERS for t in config.teachers.values() if t.weight > 0):
        yield (
            "rollout.off_policy=teacher: no teacher can write an answer; give one backend.type "
            "hf, vllm or mopd, or take off_policy=dataset"
        )
