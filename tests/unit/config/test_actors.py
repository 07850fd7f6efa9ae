"""Keys of a recipe in Ray mode, where transformers are behind servers, too."""

from __future__ import annotations

import pytest

from mopd.config.check import _backends, _launcher
from mopd.config.check_losses import check_losses
from mopd.config.check_rollout import check_rollout
from mopd.config.check_started import check_started
from mopd.config.load import load_config
from mopd.config.pools import check_pools

RAY = "launcher=ray"
TEACHER = "teachers.a.backend.type=hf"
APART = "rollout.pool=rollout"


def problems(*words: str, world_size: int = 1) -> list[str]:
    config = load_config("mopd_ctkd", ["teachers.a.model=x", *words])
    return [
        *_backends(config),
        *_launcher(config),
        *check_started(config),
        *check_pools(config),
        *check_rollout(config, world_size=world_size),
        *check_losses(config),
    ]


@pytest.mark.parametrize(
    "words",
    [
        *(
            [TEACHER, f"teachers.a.backend.{key}"]
            for key in (
                *("deadline_s=9", "max_retries=1", "max_outstanding=2", "restart_budget_s=9"),
                *("entries_per_request=99", "tolerance=0.1", "canary_interval=0", "wire=fp16"),
                *("server.replicas=2", "server.max_restarts=0", "start_s=9"),
            )
        ),
        *(
            [APART, f"rollout.backend.{key}"]
            for key in (
                *("deadline_s=9", "max_retries=1", "max_outstanding=2", "restart_budget_s=9"),
                *("weight_sync=broadcast", "sync_dir=/shared", "batch_size=2"),
                *("server.replicas=2", "server.max_restarts=0"),
            )
        ),
        [TEACHER, "teachers.a.pool=student", "teachers.a.backend.batch_size=2"],
        # an actor sends log-sum-exps and whole rows
        [TEACHER, "distillation.temperature=2", "distillation.top_k=null"],
        ["rollout.temperature=0.001", APART],  # vLLM's limit is not one of transformers
        ["rollout.backend.type=vllm", "rollout.backend.mode=colocate"],  # a student of one rank
        ["ray.address=host:6379"],
    ],
)
def test_what_an_actor_reads_passes_in_ray_mode(words: list[str]) -> None:
    assert problems(RAY, *words) == []


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (
            ["teachers.a.backend.deadline_s=9"],
            "teachers.a.backend.deadline_s: is only read by type=vllm or mopd or openai or sglang "
            "or trl, or type=hf with launcher=ray; set that, or leave the key out",
        ),
        (
            [RAY, "teachers.a.backend.deadline_s=9", "teachers.a.pool=student"],
            "or type=hf with teachers.a.pool set to another pool than the student's; set that",
        ),
        (["teachers.a.backend.wire=fp16"], "type=mopd, or type=hf with launcher=ray; set that"),
        (
            ["teachers.a.backend.server.replicas=2"],
            "type=vllm or mopd without urls, or type=hf with launcher=ray; leave one of them out",
        ),
        (
            ["rollout.backend.max_retries=2"],
            "is only read by type=vllm, or type=hf with launcher=ray and rollout.pool; set that",
        ),
        (
            [RAY, "rollout.backend.sync_dir=/shared"],
            "is only read by type=vllm, or type=hf with rollout.pool set to another pool than",
        ),
        (
            [RAY, APART, "rollout.backend.weight_sync=broadcast", "rollout.backend.sync_dir=/x"],
            "rollout.backend.sync_dir: is only read by weight_sync=files",
        ),
        ([RAY, APART, "rollout.backend.memory_fraction=0.5"], "memory_fraction: is only read by"),
        ([RAY, APART, "rollout.backend.served_model=x"], "served_model: is only read by type=vllm"),
        ([RAY, "teachers.a.backend.urls=[http://h:1]"], "backend.urls: is only read by type=vllm"),
        ([RAY, "teachers.a.backend.api_key_env=PATH"], "api_key_env: is only read by type=vllm or"),
        (
            [RAY, "teachers.a.backend.batch_size=2"],
            "batch_size: is only read by type=hf with teachers.a.pool=student; set that, or leave",
        ),
        *(
            (
                [RAY, f"teachers.a.backend.server.{key}"],
                f"teachers.a.backend.server.{key.partition('=')[0]}: is vLLM's, and backend.type=hf"
                " is transformers on one device; leave it out, or set type=vllm or mopd",
            )
            for key in ("python=/x", "args=[--x]", "devices='0'", "tensor_parallel_size=2")
        ),
        (
            [RAY, "teachers.a.backend.type=vllm", "teachers.a.backend.server.devices='0'"],
            "server.devices: with launcher=ray Ray gives the devices; leave it out (teachers.a.pool"
            " says with whom they are shared)",
        ),
        (["ray.address=host:6379"], "ray.address: is only read by launcher=ray; set that, or"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(words: list[str], found: str) -> None:
    (problem,) = problems(*words)
    assert found in problem


def test_an_engine_in_the_students_process_serves_one_rank_in_ray_mode_too() -> None:
    colocate = ["rollout.backend.type=vllm", "rollout.backend.mode=colocate"]
    (problem,) = problems(RAY, *colocate, world_size=2)
    assert "mode=colocate: vLLM in this process works for a job of one rank" in problem
    (problem,) = problems(RAY, *colocate, APART)
    assert "rollout.pool: backend.type=vllm is in the student's processes" in problem
