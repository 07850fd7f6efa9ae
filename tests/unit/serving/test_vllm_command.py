"""Words and environment of servers that mopd starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mopd.serving.vllm_command import (
    SMALL_CPU,
    TOKEN_VARIABLE,
    ServedModel,
    started_environment,
    started_words,
)

TOKEN = "t0ken-of-the-run"


def words(*, host: str = "127.0.0.1", **changes: Any) -> list[str]:
    keys: dict[str, Any] = {
        "model": Path("/m"),
        "tokenizer": None,
        "name": "teachers.a",
        "max_logprobs": None,
        "processed_logprobs": False,
        "dtype": None,
        "is_small": False,
        "more": (),
    }
    return started_words(ServedModel(**keys | changes), host=host, port=123)


def environment(base: dict[str, str], *, device: str = "cpu", devices: str | None = None) -> Any:
    return started_environment(
        base, token=TOKEN, imports=Path("/only/mopd"), device=device, devices=devices
    )


def test_a_server_is_on_the_loopback_with_mopds_endpoint() -> None:
    found = " ".join(words())
    assert "--model /m --host 127.0.0.1 --port 123 " in found
    assert "--served-model-name teachers.a" in found
    assert "--worker-extension-cls mopd." in found and "--middleware mopd." in found
    for absent in (
        "--max-model-len",
        "--max-logprobs",
        "--dtype",
        "--tokenizer",
        "--logprobs-mode",
        "--tensor-parallel-size",
    ):
        assert absent not in found
    assert "--enforce-eager" not in found


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"max_logprobs": 64}, "--max-logprobs 64"),
        ({"processed_logprobs": True}, "--logprobs-mode processed_logprobs"),
        ({"dtype": "float32", "is_small": True}, "--dtype float32 --enforce-eager"),
        ({"tokenizer": "/t"}, "--tokenizer /t"),
        ({"tensor_parallel_size": 4}, "--tensor-parallel-size 4"),
        ({"host": "10.0.0.2"}, "--host 10.0.0.2 --port 123"),
    ],
)
def test_words_of_one_choice(changes: dict[str, Any], wanted: str) -> None:
    assert wanted in " ".join(words(**changes))


def test_the_users_words_come_last_and_win() -> None:
    found = words(dtype="float32", more=("--dtype", "bfloat16"))
    assert found[-2:] == ["--dtype", "bfloat16"]


def test_the_token_is_in_the_environment_and_never_among_the_words() -> None:
    found = environment({})
    assert found[TOKEN_VARIABLE] == found["VLLM_API_KEY"] == TOKEN
    assert TOKEN not in " ".join(words())


def test_a_server_knows_nothing_of_the_trainers_ranks() -> None:
    ranks = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks |= {"MASTER_ADDR": "x", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "1"}
    found = environment(ranks | {"HOME": "/h", "MY_RANK": "3"})
    assert not ranks.keys() & found.keys()
    assert found["HOME"] == "/h" and found["MY_RANK"] == "3"


def test_a_cpu_server_is_small_unless_the_user_says_otherwise() -> None:
    assert SMALL_CPU.items() <= environment({}).items()
    own = {"VLLM_CPU_KVCACHE_SPACE": "9"}
    assert (SMALL_CPU | own).items() <= environment(own).items()
    assert not SMALL_CPU.keys() & environment({}, device="cuda").keys()


@pytest.mark.parametrize(
    ("device", "variable"),
    [("cuda", "CUDA_VISIBLE_DEVICES"), ("npu", "ASCEND_RT_VISIBLE_DEVICES")],
)
def test_devices(device: str, variable: str) -> None:
    assert environment({variable: "0"}, device=device, devices="2,3")[variable] == "2,3"
    assert environment({variable: "0"}, device=device)[variable] == "0"


def test_mopd_comes_first_on_the_path() -> None:
    assert environment({})["PYTHONPATH"] == "/only/mopd"
    assert environment({"PYTHONPATH": "/mine"})["PYTHONPATH"] == "/only/mopd:/mine"
