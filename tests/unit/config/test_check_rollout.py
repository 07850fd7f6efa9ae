"""Mistakes in how a recipe samples."""

from __future__ import annotations

import pytest

from mopd.config.check_rollout import check_rollout
from mopd.config.load import load_config
from mopd.config.schema import RunConfig

URLS = "rollout.backend.urls=[http://127.0.0.1:8000]"
SERVER = ["rollout.backend.type=vllm", URLS]
AUTHORS = [
    *("rollout.lmbda=0.5", "rollout.off_policy=teacher"),
    *("teachers.a.backend.type=sglang", "teachers.c={weight: 0}"),
]
COLOCATE = ["rollout.backend.type=vllm", "rollout.backend.mode=colocate"]


def problems(*words: str, world_size: int = 1) -> list[str]:
    config: RunConfig = load_config("mopd_ctkd", list(words))
    return list(check_rollout(config, world_size=world_size))


@pytest.mark.parametrize(
    "words",
    [
        [],
        SERVER,
        COLOCATE,
        [*SERVER, "rollout.backend.weight_sync=broadcast", "rollout.temperature=0.7"],
        [*SERVER, "rollout.backend.sync_dir=/tmp/weights", "rollout.stop_token_ids=[5,6]"],
        ["rollout.backend.type=replay", "rollout.backend.path=runs/other"],
        [*AUTHORS, "teachers.b.backend.type=hf"],
        [*AUTHORS, "teachers.b.backend={type: custom, target: 'a:b'}"],
        [*AUTHORS, "rollout.off_policy=dataset"],
        [*AUTHORS, "rollout.lmbda=1"],
    ],
)
def test_what_fits_together_passes(words: list[str]) -> None:
    assert problems(*words) == []


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["rollout.backend.type=replay"], "rollout.backend.path: is not set"),
        (["rollout.backend.path=runs/other"], "rollout.backend.path: is only read by type=replay"),
        ([URLS], "rollout.backend.urls: is only read by type=vllm"),
        (["rollout.backend.max_retries=2"], "rollout.backend.max_retries: is only read by type=v"),
        (["rollout.backend.memory_fraction=0.5"], "rollout.backend.memory_fraction: is only read"),
        ([*SERVER, "rollout.backend.memory_fraction=0.5"], "rollout.backend.memory_fraction: is"),
        ([*COLOCATE, "rollout.backend.deadline_s=2"], "rollout.backend.deadline_s: is only read"),
        ([*COLOCATE, "rollout.backend.batch_size=2"], "rollout.backend.batch_size: is only read"),
        (
            ["rollout.backend={type: custom, batch_size: 2}"],
            "rollout.backend.batch_size: is only read by type=hf, vllm or replay",
        ),
        ([*AUTHORS, "teachers.b.backend.type=uniform"], "rollout.off_policy=teacher: no teacher"),
        (["rollout.backend.mode=colocate"], "rollout.backend.mode: is only read by type=vllm"),
        (["rollout.backend.sync_dir=x"], "rollout.backend.sync_dir: is only read by type=vllm"),
        (
            ["rollout.backend.weight_sync=broadcast"],
            "rollout.backend.weight_sync: is only read by type=vllm",
        ),
        ([*COLOCATE, URLS], "rollout.backend.urls: is only read by mode=server"),
        (
            [*COLOCATE, "rollout.backend.weight_sync=broadcast"],
            "rollout.backend.weight_sync: is only read by mode=server",
        ),
        (
            [*SERVER, "rollout.backend.weight_sync=broadcast", "rollout.backend.sync_dir=x"],
            "rollout.backend.sync_dir: is only read by weight_sync=files",
        ),
        ([*SERVER, "rollout.temperature=0.001"], "rollout.temperature: vLLM samples at 0.01"),
        (["rollout.stop_token_ids=[5,5]"], "rollout.stop_token_ids: lists a token twice"),
        (
            ["rollout.backend.type=vllm", "rollout.backend.urls=[http://a:1,http://a:1]"],
            "rollout.backend.urls: lists a server twice",
        ),
        (
            ["rollout.backend.type=vllm", "rollout.backend.urls=[ftp://a:1]"],
            "rollout.backend.urls: ftp://a:1",
        ),
        (
            [*SERVER, "rollout.backend.api_key_env=NO_SUCH_VARIABLE"],
            "rollout.backend.api_key_env: the environment variable NO_SUCH_VARIABLE is not set",
        ),
    ],
)
def test_a_mistake_is_named(words: list[str], found: str) -> None:
    assert problems(*words)[0].startswith(found)


def test_an_engine_in_this_process_serves_one_rank() -> None:
    assert problems(*SERVER, world_size=4) == []
    assert "mode=colocate" in problems(*COLOCATE, world_size=4)[0]


def test_neither_a_password_nor_a_key_is_repeated() -> None:
    (found,) = problems(*SERVER, "rollout.backend.api_key_env=sk-SECRET-123")
    assert found == (
        "rollout.backend.api_key_env: give the NAME of an environment variable, not the key"
    )
    (found,) = problems(
        "rollout.backend.type=vllm", "rollout.backend.urls=['http://me:hunter2@a@b:1']"
    )
    assert "hunter2" not in found and "http://***@b:1" in found
