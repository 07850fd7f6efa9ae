"""A teacher reads more than the student: its system message, a prefix, a private field."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mopd.config.schema import PrivilegedSection
from mopd.demo import World
from mopd.teachers.base import Teacher, teacher_input, teacher_messages
from mopd.teachers.hf import HfOptions, HfTeacher
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout
from tests.helpers.stub_scorers import ModelScorer
from tests.helpers.stub_server import StubServer
from tests.helpers.teachers import make_rollout_of, remote_teacher

USER, ASSISTANT, AGAIN, SYSTEM = (
    {"role": "user", "content": "sort 3 1"},
    {"role": "assistant", "content": "1 3"},
    {"role": "user", "content": "and 2"},
    {"role": "system", "content": "be brief"},
)


@pytest.fixture(scope="module")
def student(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.student)


@pytest.fixture(scope="module")
def tokenizer(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.teachers["sort"])


def hf(world: World, student: ChatTokenizer, path: Any, **privileged: str) -> HfTeacher:
    return HfTeacher(
        "sort",
        path,
        tokenizer=ChatTokenizer.load(path),
        student=student,
        device=torch.device("cpu"),
        options=HfOptions(
            top_k=8,
            temperature=2.0,
            batch_size=2,
            privileged=PrivilegedSection(**privileged),
        ),
    )


def said(messages: list[dict[str, str]], private: dict[str, str], **keys: str) -> list[str]:
    prompt = Prompt(id="p", messages=tuple(messages), domain="d", private=private)
    found = teacher_messages(prompt, PrivilegedSection(**keys))
    return [f"{message['role']}: {message['content']}" for message in found]


def test_messages() -> None:
    chat = [USER, ASSISTANT, AGAIN]
    plain = ["user: sort 3 1", "assistant: 1 3", "user: and 2"]
    assert said(chat, {}) == plain
    assert said(chat, {}, system="S") == ["system: S", *plain]
    assert said([SYSTEM, *chat], {}, system="S") == ["system: S", *plain]
    assert said([SYSTEM, *chat], {}, prefix="P") == [
        "system: be brief",
        "user: P\n\nsort 3 1",
        *plain[1:],
    ]
    both = said(chat, {"hint": "H"}, prefix="P", field="hint", system="S")
    assert both == ["system: S", "user: P\n\nH\n\nsort 3 1", *plain[1:]]
    assert said(chat, {"hint": "H"}, field="hint")[0] == "user: H\n\nsort 3 1"


def test_the_prompt_itself_is_left_alone() -> None:
    prompt = Prompt(id="p", messages=(USER,), domain="d")
    teacher_messages(prompt, PrivilegedSection(prefix="P"))
    assert USER["content"] == "sort 3 1"
    assert teacher_messages(prompt, None) is prompt.messages


def test_a_text_needs_a_user_message() -> None:
    with pytest.raises(ValueError, match="prompt p has no user message"):
        said([SYSTEM], {}, prefix="P")


def check_scores_of_the_longer_prompt(
    knowing: Teacher, plain: Teacher, rollout: Rollout, tolerance: float
) -> None:
    prompt = replace(rollout.prompt, private={"hint": "1 2 3"})
    rollout = replace(rollout, prompt=prompt)
    messages = (
        {"role": "system", "content": "You know it all."},
        {"role": "user", "content": "Look:\n\n1 2 3\n\nbo 12 ka"},
    )
    longer = replace(rollout, prompt=replace(prompt, messages=messages))
    (found,), (wanted,) = knowing.score([rollout]), plain.score([longer])
    (blind,) = plain.score([rollout])
    assert found.token_ids.tolist() == wanted.token_ids.tolist() == blind.token_ids.tolist()
    assert found.topk_logprobs == pytest.approx(wanted.topk_logprobs, abs=tolerance)
    assert found.logprobs == pytest.approx(wanted.logprobs, abs=tolerance)
    assert np.abs(found.logprobs - blind.logprobs).max() > 10 * tolerance


PRIVILEGED = {"system": "You know it all.", "prefix": "Look:", "field": "hint"}


def test_a_teacher_with_its_own_tokens(tiny_world: World, student: ChatTokenizer) -> None:
    path = tiny_world.teachers["sort"]
    check_scores_of_the_longer_prompt(
        hf(tiny_world, student, path, **PRIVILEGED),
        hf(tiny_world, student, path),
        make_rollout_of(student, b"bo 12"),
        0.0,
    )


def test_a_teacher_with_the_students_vocabulary(tiny_world: World, student: ChatTokenizer) -> None:
    """It reads another prompt and still the student's own ids."""
    path = tiny_world.student
    knowing = hf(tiny_world, student, path, **PRIVILEGED)
    rollout = make_rollout_of(student, b"bo 12")
    check_scores_of_the_longer_prompt(knowing, hf(tiny_world, student, path), rollout, 0.0)
    rollout = replace(rollout, prompt=replace(rollout.prompt, private={"hint": "1 2 3"}))
    read = teacher_input(
        rollout, student, student=student, privileged=PrivilegedSection(**PRIVILEGED)
    )
    assert read.token_ids is rollout.token_ids
    assert len(read.prompt_ids) > len(rollout.prompt_ids)
    assert rollout.prompt_ids.tolist() == student.prompt_ids(rollout.prompt.messages).tolist()


@pytest.mark.parametrize("shape", ["vllm", "mopd"])
def test_a_teacher_behind_a_server(
    shape: str, tiny_world: World, student: ChatTokenizer, tokenizer: ChatTokenizer
) -> None:
    scorer = ModelScorer(tiny_world.teachers["sort"], vocab_size=tokenizer.vocabulary.size)
    with StubServer(scorer) as stub:
        knowing, plain = (
            remote_teacher(
                [stub.url],
                tokenizer=tokenizer,
                student=student,
                shape=shape,
                privileged=PrivilegedSection(**keys),
            )
            for keys in (PRIVILEGED, {})
        )
        check_scores_of_the_longer_prompt(knowing, plain, make_rollout_of(student, b"bo 12"), 1e-6)
        knowing.close()
        plain.close()


def test_accuracy_is_measured_with_what_the_teacher_reads(
    tiny_world: World, student: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = hf(tiny_world, student, tiny_world.teachers["sort"], prefix="Look:")
    asked: list[Any] = []
    original = teacher.tokenizer.prompt_ids

    def prompt_ids(messages: Any) -> np.ndarray:
        asked.append(messages)
        return original(messages)

    monkeypatch.setattr(teacher.tokenizer, "prompt_ids", prompt_ids)
    prompt = Prompt(id="p", messages=(USER,), domain="d", answer="1 3")
    assert teacher.accuracy([prompt], max_new_tokens=2) is not None
    assert asked[0][0]["content"] == "Look:\n\nsort 3 1"
