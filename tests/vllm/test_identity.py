"""A real vLLM server reads texts and chats as its tokenizer does, and another one is told apart."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from mopd.errors import TeacherError
from mopd.serving.endpoint import Endpoint, EndpointOptions
from mopd.serving.protocols import VllmCompletions
from mopd.teachers.identity import Identity
from mopd.tokens.chat import ChatTokenizer
from tests.faults import refusals
from tests.helpers.vllm_server import VllmServer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def check(url: str, tokenizer: Path) -> None:
    async def ask() -> None:
        options = EndpointOptions(
            protocols=(VllmCompletions(),), deadline_s=60.0, max_outstanding=2, start_s=5.0
        )
        endpoint = Endpoint(url, options)
        try:
            await endpoint.start()
            assert await endpoint.tokenize("bo") is not None
            await Identity("sort", ChatTokenizer.load(tokenizer)).check(endpoint, whole=True)
        finally:
            await endpoint.close()

    asyncio.run(ask())


def test_its_own_tokenizer_agrees(vllm_server: VllmServer) -> None:
    check(vllm_server.url, vllm_server.model_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": refusals.without_a_merge}, "other merges or pieces"),
        ({"tokenizer": refusals.another_revision}, "other merges or pieces"),
        (
            {
                "tokenizer": refusals.another_added_token,
                "tokenizer_config": {"pad_token": "<|fim|>"},
            },
            "another set of added tokens",
        ),
        ({"template": lambda text: text.replace("<|eot_id|>", "<|eot_id|>\n")}, "chat template"),
    ],
    ids=["merge", "revision", "added", "template"],
)
def test_another_tokenizer_does_not(
    vllm_server: VllmServer, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    other = refusals.changed_copy(vllm_server.model_dir, tmp_path / "other", **changes)
    with pytest.raises(TeacherError, match=message):
        check(vllm_server.url, other)
