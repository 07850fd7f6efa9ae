"""What a server is asked to show that it has the recipe's tokenizer, and when it is not asked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mopd.config.backends import TeacherBackendSection
from mopd.demo import World
from mopd.errors import TeacherError
from mopd.runtime.teachers import protocols
from mopd.serving.endpoint import Endpoint, EndpointOptions
from mopd.serving.http import RetryableError
from mopd.teachers import identity
from mopd.teachers.identity import CHATS, Identity
from mopd.tokens.chat import ChatTokenizer
from tests.helpers.stub_scorers import PrefixScorer
from tests.helpers.stub_server import StubOptions, StubServer

TEXTS = ["bo 12 ka", "<|pad|> 3", "sort"]


class Tokenizer(ChatTokenizer):
    """Of a server: some requests are answered otherwise."""

    longest = 1 << 20
    refuses: tuple[str, ...] = ()  # roles
    more = 0  # added to every id

    def text_ids(self, text: str) -> list[int]:
        found = super().text_ids(text)
        return [index + self.more for index in found] if len(text) <= self.longest else None  # type: ignore[return-value]

    def chat_ids(self, messages: Any, *, add_generation_prompt: bool) -> list[int] | None:
        if any(message["role"] in self.refuses for message in messages):
            return None
        return super().chat_ids(messages, add_generation_prompt=add_generation_prompt)


@pytest.fixture
def own(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.teachers["sort"])


@pytest.fixture
def its(tiny_world: World) -> Tokenizer:
    found = Tokenizer.load(tiny_world.teachers["sort"])
    assert isinstance(found, Tokenizer)
    return found


def check(
    tokenizer: ChatTokenizer, server: StubServer, *, whole: bool = True, shape: str = "vllm"
) -> list[Any]:
    """What the server was asked and answered, texts or the number of messages."""

    async def ask() -> None:
        spoken = protocols(TeacherBackendSection.model_validate({"type": shape}), tokenizer)
        options = EndpointOptions(protocols=spoken, deadline_s=20.0, max_outstanding=2, start_s=5.0)
        endpoint = Endpoint(server.url, options)
        found = Identity("sort", tokenizer)
        found.__dict__["_texts"] = TEXTS
        try:
            await found.check(endpoint, whole=whole)
        finally:
            await endpoint.close()

    asyncio.run(ask())
    return [asked.get("prompt", len(asked.get("messages", ()))) for asked in server.tokenized]


def serve(tokenizer: ChatTokenizer | None) -> StubServer:
    return StubServer(PrefixScorer(560), StubOptions(tokenizer=tokenizer))


def test_all_texts_and_chats_are_asked(own: ChatTokenizer, its: Tokenizer) -> None:
    chats = [len(messages) for messages, _ in CHATS]
    with serve(its) as server:
        assert check(own, server) == ["x", *TEXTS, *chats]
    with serve(its) as server:
        assert check(own, server, whole=False) == ["x", TEXTS[0], *chats]


def test_no_further_text_is_asked_when_the_time_is_over(
    own: ChatTokenizer, its: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "CHECK_S", 0.0)
    with serve(its) as server:
        assert check(own, server)[:2] == ["x", TEXTS[0]]
        assert TEXTS[1] not in check(own, server)


def test_a_server_that_does_not_say_is_not_judged(own: ChatTokenizer, its: Tokenizer) -> None:
    with serve(None) as server:
        assert check(own, server) == []
    with serve(its) as server:
        assert check(own, server, shape="openai") == []


def test_a_server_without_a_template_is_judged_by_texts(own: ChatTokenizer, its: Tokenizer) -> None:
    its.refuses = ("user",)
    with serve(its) as server:
        assert check(own, server) == ["x", *TEXTS]


def test_a_template_that_refuses_more_is_another(own: ChatTokenizer, its: Tokenizer) -> None:
    its.refuses = ("system",)
    with (
        serve(its) as server,
        pytest.raises(TeacherError, match="a chat of system, user with other tokens"),
    ):
        check(own, server)


def test_a_server_that_answers_only_short_texts_is_refused(
    own: ChatTokenizer, its: Tokenizer
) -> None:
    its.longest = 8
    with serve(its) as server, pytest.raises(TeacherError, match="refuses 9 characters"):
        check(own, server)


def test_ids_that_are_none_count_as_no_answer(own: ChatTokenizer, its: Tokenizer) -> None:
    its.more, its.refuses = 1 << 40, ("user",)
    with serve(its) as server:
        assert check(own, server) == ["x"]


def test_a_server_that_is_gone_is_no_server_without_a_tokenizer(
    own: ChatTokenizer, its: Tokenizer
) -> None:
    with serve(its) as server:
        pass
    with pytest.raises(RetryableError):
        check(own, server)
