"""Keys of teachers behind servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mopd.config.backends import ServerSection
from mopd.config.check import _backends, _paths
from mopd.config.check_losses import check_losses
from mopd.config.check_rollout import check_rollout
from mopd.config.check_servers import device_shares, is_started
from mopd.config.check_started import check_started
from mopd.config.schema import RunConfig

URL = "http://127.0.0.1:8000"


def problems(backend: dict[str, Any], **sections: Any) -> list[str]:
    teacher = {"model": "x", "backend": backend}
    config = RunConfig.model_validate({"teachers": {"a": teacher}} | sections)
    return [*_backends(config), *check_started(config)]


@pytest.mark.parametrize("kind", ["vllm", "mopd", "openai", "sglang", "trl"])
def test_a_server_is_enough(kind: str) -> None:
    assert problems({"type": kind, "urls": [URL, "http://127.0.0.1:8001"]}) == []


@pytest.mark.parametrize(
    ("backend", "sections", "message"),
    [
        ({"type": "openai"}, {}, "backend.urls: is empty"),
        (
            {"type": "vllm", "urls": [URL], "server": {"replicas": 2}},
            {},
            "backend.server.replicas: is only read where mopd starts the server itself: type=vllm",
        ),
        ({"type": "hf", "server": {"args": ["--x"]}}, {}, "server.args: is only read where"),
        (
            {"type": "vllm", "server": {"devices": "0,1,2", "replicas": 2}},
            {},
            "server.devices: 3 cannot be shared evenly by 2 replicas",
        ),
        (
            {
                "type": "vllm",
                "server": {"devices": "0,1,2", "replicas": 2, "tensor_parallel_size": 2},
            },
            {},
            "server.devices: 3 cannot be shared evenly by 2 replicas "
            "(server.tensor_parallel_size=2); name 2 for all of them, or a multiple of 4",
        ),
        (
            {"type": "vllm", "server": {"devices": "0", "tensor_parallel_size": 2}},
            {},
            "server.devices: 1 cannot be shared evenly by 1 replicas "
            "(server.tensor_parallel_size=2); name 2 for all of them",
        ),
        (
            {"type": "vllm", "server": {"args": ["--tensor_parallel_size=2"]}},
            {},
            "set teachers.a.backend.server.tensor_parallel_size instead",
        ),
        (
            {"type": "vllm", "server": {"args": ["-tp", "2"]}},
            {},
            "server.args: -tp is a key of its own",
        ),
        ({"type": "vllm", "api_key_env": "PATH"}, {}, "get a key of their own; set it to null"),
        (
            {"type": "vllm", "server": {"args": ["--max-model-len=9", "--api_key=x"]}},
            {},
            "server.args: --api-key is written by mopd itself",
        ),
        ({"type": "vllm", "urls": [URL, URL]}, {}, "lists a server twice"),
        ({"type": "vllm", "urls": ["ftp://x"]}, {}, "must begin with http"),
        ({"type": "hf", "urls": [URL]}, {}, "urls: is only read by type=vllm or mopd or openai"),
        ({"type": "uniform", "served_model": "m"}, {}, "served_model: is only read"),
        (
            {"type": "vllm", "urls": [URL]},
            {"distillation": {"temperature": 2.0}},
            "sends no log-sum-exp; set temperature to 1",
        ),
        ({"type": "vllm", "urls": [URL], "wire": "fp16"}, {}, "wire: is only read by type=mopd"),
        ({"type": "hf", "wire": "fp16"}, {}, "wire: is only read by type=mopd"),
        ({"type": "mopd", "urls": [URL], "served_model": "m"}, {}, "type=mopd names no models"),
        ({"type": "trl", "urls": [URL], "served_model": "m"}, {}, "type=trl names no models"),
        (
            {"type": "sglang", "urls": [URL]},
            {"distillation": {"temperature": 2.0}},
            "sends no log-sum-exp; set temperature to 1",
        ),
        ({"type": "hf", "deadline_s": 2.0}, {}, "backend.deadline_s: is only read by type=vllm"),
        ({"type": "uniform", "max_retries": 1}, {}, "backend.max_retries: is only read by"),
        ({"type": "hf", "tolerance": 1.0}, {}, "backend.tolerance: is only read by type=vllm or"),
        ({"type": "hf", "canary_interval": 0}, {}, "backend.canary_interval: is only read by"),
        ({"type": "uniform", "max_outstanding": 1}, {}, "backend.max_outstanding: is only read"),
        (
            {"type": "custom", "target": "a:b", "entries_per_request": 9},
            {},
            "backend.entries_per_request: is only read by type=vllm or mopd",
        ),
        ({"type": "custom", "target": "a:b", "batch_size": 2}, {}, "is only read by type=hf;"),
        ({"type": "vllm", "urls": [URL], "batch_size": 2}, {}, "backend.batch_size: is only read"),
        ({"type": "vllm", "urls": [URL], "api_key_env": "NO_SUCH_KEY"}, {}, "NO_SUCH_KEY is not"),
        ({"type": "vllm", "urls": [URL], "api_key_env": "sk-12-34"}, {}, "give the NAME"),
    ],
)
def test_mistakes(backend: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    (found,) = problems(backend, **sections)
    assert message in found


@pytest.mark.parametrize("kind", ["vllm", "mopd"])
def test_without_urls_mopd_starts_the_server_of_a_model_that_is_there(
    kind: str, tmp_path: Path
) -> None:
    assert problems({"type": kind, "server": {"args": ["--dtype", "bfloat16"]}}) == []
    found = []
    for model in (None, "nowhere", str(tmp_path)):
        teacher = {"model": model, "tokenizer": str(tmp_path), "backend": {"type": kind}}
        config = RunConfig.model_validate({"teachers": {"a": teacher}})
        found += [line for line in _paths(config) if line.startswith("teachers.a.model")]
    first, second, third = found
    assert "is not set" in first and "not a directory" in second and "no config.json" in third


def test_a_sampler_is_started_in_server_mode_only() -> None:
    rollouts = [
        RunConfig.model_validate({"rollout": {"backend": {"type": "vllm"} | keys}}).rollout.backend
        for keys in ({}, {"mode": "colocate"}, {"urls": [URL]})
    ]
    assert [is_started(backend) for backend in rollouts] == [True, False, False]
    config = RunConfig.model_validate(
        {"rollout": {"backend": {"type": "hf", "server": {"max_restarts": 0}}}}
    )
    (found,) = check_started(config)
    assert found.startswith("rollout.backend.server.max_restarts: is only read")


@pytest.mark.parametrize("owner", ["rollout", "teachers.a"])
@pytest.mark.parametrize("launcher", ["ray", "torchrun"])
def test_transformers_in_an_actor_has_the_keys_of_its_requests(owner: str, launcher: str) -> None:
    keys = {"restart_budget_s": 5, "server": {"max_restarts": 0, "replicas": 2}}
    section = {"backend": {"type": "hf", **keys}}
    config = RunConfig.model_validate(
        {
            "launcher": launcher,
            "teachers": {"a": {"model": "x"} | (section if owner != "rollout" else {})},
            "rollout": section | {"pool": "apart"} if owner == "rollout" else {},
        }
    )
    found = [
        *_backends(config),
        *check_rollout(config, world_size=1),
        *check_started(config),
    ]
    told = sorted(text.partition(":")[0].removeprefix(f"{owner}.backend.") for text in found)
    refused = ["restart_budget_s", "server.max_restarts", "server.replicas"]
    assert told == ([] if launcher == "ray" else refused)


@pytest.mark.parametrize(
    ("devices", "replicas", "size", "shares"),
    [
        (None, 2, 1, [None, None]),
        ("3", 2, 1, ["3", "3"]),
        ("0,1,2,3", 2, 1, ["0,1", "2,3"]),
        ("0,1", 1, 1, ["0,1"]),
        ("0,1", 2, 2, ["0,1", "0,1"]),
        ("0,1,2,3", 2, 2, ["0,1", "2,3"]),
        ("0,1,2,3", 1, 2, ["0,1,2,3"]),
    ],
)
def test_replicas_share_the_devices(
    devices: str | None, replicas: int, size: int, shares: list[str | None]
) -> None:
    server = ServerSection(devices=devices, replicas=replicas, tensor_parallel_size=size)
    assert device_shares(server) == shares
    backend = {"type": "vllm", "server": server.model_dump()}
    assert problems(backend) == []


def test_neither_a_password_nor_a_key_is_repeated() -> None:
    (found,) = problems({"type": "vllm", "urls": ["http://me:hunter2@host"]})
    assert "hunter2" not in found and "***" in found
    (found,) = problems({"type": "vllm", "urls": [URL], "api_key_env": "sk-hunter2"})
    assert "hunter2" not in found


def test_mopd_serve_sends_log_sum_exps_and_whole_rows() -> None:
    backend = {"type": "mopd", "urls": [URL], "wire": "fp16"}
    assert problems(backend, distillation={"temperature": 2.0, "top_k": None}) == []
    recipe = {"teachers": {"a": {"backend": backend}}, "distillation": {"top_k": None}}
    assert list(check_losses(RunConfig.model_validate(recipe))) == []
    backend["type"] = "sglang"
    (found,) = check_losses(RunConfig.model_validate(recipe))
    assert "backend.type=sglang sends lists" in found
