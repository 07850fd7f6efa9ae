"""A server that cannot be the teacher is refused at the start, in one line with a remedy."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from mopd.demo import World
from mopd.errors import ConfigError, TeacherError
from mopd.tokens.chat import ChatTokenizer
from tests.helpers.stub_scorers import PrefixScorer
from tests.helpers.stub_server import StubOptions, StubServer
from tests.helpers.teachers import make_rollout_of, remote_teacher

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # what the server is like, what the recipe asks, what the line says
    "model": ({}, {"endpoint": {"served_model": "wanted"}}, r"no model 'wanted'.*served_model"),
    "cap": ({"max_logprobs": 5}, {}, r"refuses 8 log-prob.*--max-logprobs 8"),
    "small vocabulary": ({"vocab_size": 300}, {}, r"refuses ids below the 560.*tokenizer"),
    "wide vocabulary": ({"width": 700}, {}, r"ids beyond the 560 of the tokenizer"),
    "context": ({"max_model_len": 60}, {}, r"reads 59 tokens.*--max-model-len"),
    "temperature": ({"tempered": True}, {}, r"temperature.*raw_logprobs"),
    "order": ({"ordered": False}, {}, r"in another order|breaks the contract"),
    "template": ({"chat": lambda messages: [1, 2, 3]}, {}, r"other chat template.*sort\.tokenizer"),
    "key": ({"key": "secret"}, {}, r"401.*api_key_env"),
}


@pytest.fixture(scope="module")
def student(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.student)


@pytest.fixture(scope="module")
def tokenizer(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.teachers["sort"])


@pytest.fixture(scope="module")
def scorer(tokenizer: ChatTokenizer) -> PrefixScorer:
    return PrefixScorer(tokenizer.vocabulary.size)


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_server_is_refused(
    case: str, scorer: PrefixScorer, tokenizer: ChatTokenizer, student: ChatTokenizer
) -> None:
    options, recipe, message = CASES[case]
    with (
        StubServer(scorer, StubOptions(**options)) as server,
        pytest.raises(TeacherError, match=message) as caught,
    ):
        remote_teacher([server.url], tokenizer=tokenizer, student=student, **recipe)
    text = str(caught.value)
    assert text.startswith("teachers.sort: http://127.0.0.1:") and "\n" not in text


def test_the_right_server_is_taken(
    scorer: PrefixScorer,
    tokenizer: ChatTokenizer,
    student: ChatTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With everything that the cases above get wrong."""
    monkeypatch.setenv("SORT_KEY", "secret")
    options = StubOptions(
        key="secret",
        tokenizer=tokenizer,
        max_logprobs=8,
        vocab_size=560,
    )
    caplog.set_level("DEBUG")
    with StubServer(scorer, options) as server:
        teacher = remote_teacher(
            [server.url],
            tokenizer=tokenizer,
            student=student,
            endpoint={"api_key_env": "SORT_KEY", "served_model": "stub"},
        )
        (scores,) = teacher.score([make_rollout_of(student, b"1 2")])
        assert teacher.accuracy([], max_new_tokens=4) is None
        teacher.close()
    assert scores.valid.all() and scores.model_fingerprint.startswith("stub@")
    assert all(headers["authorization"] == "Bearer secret" for headers in server.headers)
    assert "secret" not in caplog.text


def test_a_key_that_is_not_set_is_a_mistake_in_the_recipe(
    tokenizer: ChatTokenizer, student: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SORT_KEY", raising=False)
    for value in (None, "two\nlines", " x"):
        if value is not None:
            monkeypatch.setenv("SORT_KEY", value)
        with pytest.raises(ConfigError, match="SORT_KEY"):
            remote_teacher(
                ["http://127.0.0.1:9"],
                tokenizer=tokenizer,
                student=student,
                endpoint={"api_key_env": "SORT_KEY"},
            )


def test_replicas_of_two_models_are_refused(
    tokenizer: ChatTokenizer, student: ChatTokenizer
) -> None:
    with ExitStack() as stack:
        size = tokenizer.vocabulary.size
        servers = [stack.enter_context(StubServer(PrefixScorer(size, seed=s))) for s in (0, 1)]
        with pytest.raises(TeacherError, match=r"first replica: another model"):
            remote_teacher([s.url for s in servers], tokenizer=tokenizer, student=student)


def test_a_server_that_is_not_there_is_waited_for_and_then_named(
    tokenizer: ChatTokenizer, student: ChatTokenizer
) -> None:
    with pytest.raises(TeacherError, match=r"cannot connect.*is the server running"):
        remote_teacher(
            ["http://127.0.0.1:9"], tokenizer=tokenizer, student=student, endpoint={"start_s": 0.2}
        )


def test_strings_that_several_tokens_share_are_refused(
    scorer: PrefixScorer, tokenizer: ChatTokenizer, student: ChatTokenizer
) -> None:
    pieces = tokenizer.vocabulary.token_bytes
    names = [piece.decode(errors="replace") for piece in pieces]
    with (
        StubServer(scorer, StubOptions(names=names)) as server,
        pytest.raises(TeacherError, match=r"several tokens share.*backend\.type=vllm"),
    ):
        remote_teacher([server.url], tokenizer=tokenizer, student=student, shape="openai")
