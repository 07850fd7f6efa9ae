"""What is asked of the prompts as a whole before the first step: that templates take them, that
contexts hold them, that somebody writes their off-policy answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mopd.config.schema import RunConfig
from mopd.demo import World
from mopd.errors import ConfigError
from mopd.runtime.build_feed import _check_responses
from mopd.runtime.data import check_chats
from mopd.runtime.teachers import LOOKED_AT, context_warnings
from mopd.teachers.pool import TeacherPool
from mopd.teachers.uniform import UniformTeacher
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt
from tests.faults.refusals import changed_copy

USERS_ONLY = "{% if messages[0].role != 'user' %}{{ raise_exception('users only') }}{% endif %}x"


@pytest.fixture(scope="module")
def student(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.student)


@pytest.fixture(scope="module")
def strict(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    path = tmp_path_factory.mktemp("strict") / "m"
    changed_copy(tiny_world.teachers["sort"], path, template=lambda text: USERS_ONLY)
    return ChatTokenizer.load(path)


def prompt(name: str, *contents: str, role: str = "user", teachers: str = "sort") -> Prompt:
    messages = tuple({"role": role, "content": content} for content in contents)
    return Prompt(id=name, messages=messages, domain="d", teachers=tuple(teachers.split()))


def recipe(backend: dict[str, Any], **sections: Any) -> RunConfig:
    teacher = {"backend": backend, "privileged": sections.pop("privileged", {})}
    return RunConfig.model_validate(
        {"teachers": {"sort": teacher, "off": {"weight": 0}}} | sections
    )


def check(config: RunConfig, student: ChatTokenizer, strict: ChatTokenizer, *rows: Prompt) -> None:
    check_chats("data.path", rows, config=config, student=student, teachers={"sort": strict})


@pytest.mark.parametrize("kind", ["hf", "vllm", "uniform"])
def test_a_row_that_a_template_refuses(
    kind: str, student: ChatTokenizer, strict: ChatTokenizer
) -> None:
    config = recipe({"type": kind})
    good, bad = prompt("good", "hi"), prompt("bad", "hi", role="system")
    check(config, student, strict, good)
    wanted = r"^data\.path: row bad: teachers\.sort: .* refuses messages of system \(users only\)"
    with pytest.raises(ConfigError, match=wanted):
        check(config, student, strict, good, good, bad)
    check(config, student, student, good, bad)  # another template
    check(config, student, strict, good, prompt("bad", "hi", role="system", teachers=""))
    with pytest.raises(ConfigError, match=r"^data\.path: row bad: student: "):
        check(config, strict, student, good, bad)


def test_what_a_teacher_alone_reads_is_looked_at(
    student: ChatTokenizer, strict: ChatTokenizer
) -> None:
    config = recipe({"type": "hf"}, privileged={"system": "S"})
    with pytest.raises(ConfigError, match=r"row good: teachers\.sort: .* messages of system, user"):
        check(config, student, strict, prompt("good", "hi"))


def test_a_custom_teacher_reads_as_it_likes(student: ChatTokenizer, strict: ChatTokenizer) -> None:
    bad = prompt("bad", "hi", role="system")
    check(recipe({"type": "custom", "target": "a:b"}), student, strict, bad)


class Reader:
    """A teacher of some context whose template writes one token a character."""

    def __init__(self, max_length: int | None) -> None:
        self.max_length = max_length
        self.rendered = 0
        self.tokenizer = SimpleNamespace(prompt_ids=self._ids)

    def _ids(self, messages: Any) -> np.ndarray:
        self.rendered += 1
        return np.zeros(sum(len(message["content"]) for message in messages), dtype=np.int32)


def warnings(
    reader: Any, prompts: list[Prompt], *, answer: int = 10, **privileged: str
) -> list[str]:
    config = recipe({}, rollout={"max_new_tokens": answer}, privileged=privileged)
    return list(context_warnings(config, TeacherPool({"sort": reader}), prompts))


def test_prompts_that_leave_too_little_room_are_counted() -> None:
    rows = [prompt(str(size), "x" * size) for size in (20, 41, 40, 5, 60)]
    assert warnings(Reader(70), rows) == []
    (line,) = warnings(Reader(50), rows)
    assert line.startswith("teachers.sort: reads 50 tokens, and 2 of 5 prompts with an answer of ")
    assert "rollout.max_new_tokens=10 have more (the longest prompt: 60)" in line
    assert "missing/sort/context" in line
    assert warnings(Reader(None), rows) == []
    assert warnings(Reader(1), [prompt("other", "x" * 9, teachers="off")]) == []


def test_the_privileged_text_counts() -> None:
    rows = [prompt("a", "x" * 20)]
    assert warnings(Reader(40), rows, prefix="y" * 8) == []
    assert len(warnings(Reader(40), rows, prefix="y" * 9)) == 1  # a blank line between


def test_no_room_for_any_answer_is_a_mistake() -> None:
    rows = [prompt(str(size), "x" * size) for size in (30, 50, 31)]
    with pytest.raises(ConfigError, match=r"^teachers\.sort: reads 30 tokens, and no prompt of"):
        warnings(Reader(30), rows)
    assert len(warnings(Reader(31), rows)) == 1


def test_of_many_prompts_few_are_cut_into_tokens() -> None:
    rows = [prompt(str(n), "x" * (n % 100 + 1)) for n in range(5000)]
    reader = Reader(60)
    (line,) = warnings(reader, rows)
    assert f"at least {LOOKED_AT} of 5000 prompts" in line
    assert reader.rendered <= 2 * LOOKED_AT


def test_a_teacher_without_a_context_is_not_asked(student: ChatTokenizer) -> None:
    teacher = UniformTeacher("sort", tokenizer=student, student=student, top_k=4)
    assert warnings(teacher, [prompt("a", "x" * 999)]) == []


class Author:
    def write(self, *args: Any, **keys: Any) -> list[tuple[bytes, bool]]:
        raise AssertionError("only asked whether it can")


def test_every_prompt_needs_an_author_of_its_off_policy_answers() -> None:
    pool: Any = SimpleNamespace(teachers={"sort": Author(), "deaf": object()})
    rows = [prompt("a", "x"), prompt("b", "x", teachers="deaf sort")]
    mute = prompt("c", "x", teachers="deaf")
    teacher = recipe({}, rollout={"lmbda": 0.5, "off_policy": "teacher"})
    _check_responses(teacher, rows, pool)
    with pytest.raises(ConfigError, match=r"off_policy=teacher: no teacher of prompt c can write"):
        _check_responses(teacher, [*rows, mute], pool)
    _check_responses(recipe({}, rollout={"off_policy": "teacher"}), [mute], pool)
    with pytest.raises(ConfigError, match=r"row a of data\.path has no `response`"):
        _check_responses(recipe({}, rollout={"lmbda": 0.5}), rows, pool)
