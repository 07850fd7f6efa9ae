"""Keys of teachers behind servers."""

from __future__ import annotations

from typing import Any

import pytest

from mopd.config.check import _backends
from mopd.config.check_losses import check_losses
from mopd.config.schema import RunConfig

URL = "http://127.0.0.1:8000"


def problems(backend: dict[str, Any], **sections: Any) -> list[str]:
    teacher = {"model": "x", "backend": backend}
    return list(_backends(RunConfig.model_validate({"teachers": {"a": teacher}} | sections)))


@pytest.mark.parametrize("kind", ["vllm", "mopd", "openai", "sglang", "trl"])
def test_a_server_is_enough(kind: str) -> None:
    assert problems({"type": kind, "urls": [URL, "http://127.0.0.1:8001"]}) == []


@pytest.mark.parametrize(
    ("backend", "sections", "message"),
    [
        ({"type": "vllm"}, {}, "backend.urls: is empty"),
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
        ({"type": "vllm", "urls": [URL], "api_key_env": "NO_SUCH_KEY"}, {}, "NO_SUCH_KEY is not"),
        ({"type": "vllm", "urls": [URL], "api_key_env": "sk-12-34"}, {}, "give the NAME"),
    ],
)
def test_mistakes(backend: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    (found,) = problems(backend, **sections)
    assert message in found


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
