"""Mistakes in how a recipe samples."""

from __future__ import annotations

import pytest

from mopd.config.check_rollout import check_rollout
from mopd.config.load import load_config
from mopd.config.schema import RunConfig

URLS = "rollout.backend.urls=[http://127.0.0.1:8000]"
SERVER = ["rollout.backend.type=vllm", URLS]
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
