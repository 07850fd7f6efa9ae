"""Prompts from JSONL, routed to teachers, and drawn in an order that depends on the seed alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mopd.config.schema import DistillationSection, RunConfig, TeacherSection
from mopd.errors import ConfigError
from mopd.runtime.payloads import active_teachers
from mopd.teachers.base import teacher_messages
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt


class Router:
    """Domain -> the teachers that judge it; others go to the default teacher or are refused."""

    def __init__(
        self, teachers: Mapping[str, TeacherSection], distillation: DistillationSection
    ) -> None:
        self._teachers = {name: t for name, t in teachers.items() if t.weight > 0}
        self._default = distillation.default_teacher
        if self._default is not None and self._default not in self._teachers:
            raise ConfigError(
                f"distillation.default_teacher={self._default} is no teacher with a weight; "
                "name another, or null"
            )
        self._key = distillation.teacher_key
        self._top_k = distillation.top_k

    def route(self, domain: str, where: str) -> tuple[str, ...]:
        """Names of the teachers of a row at ``where`` (file and line, for the error)."""
        names = tuple(
            name
            for name, teacher in self._teachers.items()
            if not teacher.domains or domain in teacher.domains
        )
        if not names and self._default is not None:
            return (self._default,)
        if not names:
            raise ConfigError(
                f"{where}: no teacher judges {self._key}={domain!r}; list it in "
                "teachers.<name>.domains or set distillation.default_teacher"
            )
        return names

    def private(self, row: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, str]:
        """Fields of a row that its teachers ``names`` alone may read."""
        found: dict[str, str] = {}
        for name in names:
            section = self._teachers[name].privileged
            if section.field is not None:
                value = row.get(section.field)
                if not isinstance(value, str):
                    raise ConfigError(
                        f"{where}: teachers.{name}.privileged.field={section.field!r} must be a "
                        "string in every row that this teacher judges; add it, or drop the key"
                    )
                found[section.field] = value
            spoken = section.field is not None or section.prefix is not None
            if spoken and not any(message["role"] == "user" for message in row["messages"]):
                raise ConfigError(
                    f"{where}: no user message, and teachers.{name}.privileged puts a text before "
                    "it; add one, or use privileged.system"
                )
        return found

    def top_k(self, row: Mapping[str, Any], where: str) -> int | None:
        """The row's own top-k."""
        value = row.get("top_k")
        if value is None:
            return None
        if self._top_k is None:
            raise ConfigError(
                f"{where}: 'top_k' cuts lists, and distillation.top_k=null asks for whole rows; "
                "give distillation.top_k a number, or drop the field"
            )
        if type(value) is not int or not 1 <= value <= self._top_k:
            raise ConfigError(
                f"{where}: 'top_k' must be an integer from 1 to distillation.top_k={self._top_k}, "
                f"not {value!r}"
            )
        return value


def read_prompts(path: Path, *, router: Router, teacher_key: str) -> list[Prompt]:
    """Every row of a JSONL file as a `Prompt`.

    A row has ``messages`` (role and content), and optionally ``id``, ``answer``, ``response`` (an
    answer for off-policy training), ``top_k``, the routing field and what teachers'
    ``privileged.field`` names. Rows without an id are named by file and line.

    Raises:
        ConfigError: with file and line, what is wrong and what was expected.
    """
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = _parse(line, where)
        prompt_id = str(row.get("id", f"{path.stem}-{number}"))
        if prompt_id in seen:
            raise ConfigError(f"{where}: id {prompt_id!r} is used twice; ids must be unique")
        seen.add(prompt_id)
        domain = str(row.get(teacher_key, "default"))
        answer = row.get("answer")
        messages, teachers = _messages(row, where), router.route(domain, where)
        prompt = Prompt(
            id=prompt_id,
            messages=messages,
            domain=domain,
            answer=None if answer is None else str(answer),
            teachers=teachers,
            top_k=router.top_k(row, where),
            response=_response(row, where),
            private=router.private(row, teachers, where),
        )
        _check_characters(prompt, where, teacher_key)
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"{path}: no rows; one JSON object a line with 'messages' is expected")
    return prompts


def check_chats(
    key: str,
    prompts: Sequence[Prompt],
    *,
    config: RunConfig,
    student: ChatTokenizer,
    teachers: Mapping[str, ChatTokenizer],
) -> None:
    """Whether the templates of all who read a row take its roles; one row of each kind is rendered.

    Custom teachers may read rows in their own way and are not asked.

    Args:
        key: where the rows come from, as in data.path.
    Raises:
        ConfigError: the row, the template that refuses it, and the remedy.
    """
    privileged = {
        name: None if section.backend.type == "uniform" else section.privileged
        for name, section in active_teachers(config).items()
        if section.backend.type != "custom"
    }
    seen: set[tuple[str, ...]] = set()
    for prompt in prompts:
        readers = [("student", student, prompt.messages)]
        for name in prompt.teachers:
            if name in privileged:
                messages = teacher_messages(prompt, privileged[name])
                readers.append((f"teachers.{name}", teachers[name], messages))
        for reader, tokenizer, messages in readers:
            kind = (reader, *(message["role"] for message in messages))
            if kind in seen:
                continue
            seen.add(kind)
            try:
                tokenizer.prompt_ids(messages)
            except ConfigError as error:
                raise ConfigError(f"{key}: row {prompt.id}: {reader}: {error}") from error


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from None


def _check_characters(prompt: Prompt, where: str, teacher_key: str) -> None:
    texts = {
        "id": (prompt.id,),
        teacher_key: (prompt.domain,),
        "answer": (prompt.answer or "",),
        "response": (prompt.response or "",),
        "messages": [text for message in prompt.messages for text in message.values()],
        **{name: (text,) for name, text in prompt.private.items()},
    }
    for name, found in texts.items():
        try:
            "".join(found).encode()
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise ConfigError(
                f"{where}: {name!r} holds half a character (\\u{code:04x}), which no tokenizer "
                "reads; write the whole one, or take it out"
            ) from None


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also of numbers too long, and of too deep
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise ConfigError(f"{where}: not JSON ({reason}); one object a line is expected") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: a JSON object with 'messages' is expected")
    return row


def _response(row: dict[str, Any], where: str) -> str | None:
    response = row.get("response")
    if response is not None and not isinstance(response, str):
        raise ConfigError(f"{where}: 'response' must be a string, the answer to train on")
    return response


def _messages(row: dict[str, Any], where: str) -> tuple[dict[str, str], ...]:
    messages = row.get("messages")
    good = isinstance(messages, list) and messages
    if not good or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages or ()
    ):
        raise ConfigError(
            f"{where}: 'messages' must be a list of objects with 'role' and 'content' strings"
        )
    assert messages is not None
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


class PromptSource:
    """Prompts of any step without having drawn those before: resuming needs no state.

    Each domain runs through its own permutation, a new one every epoch. With ``balance_domains``
    every step holds equally many prompts per domain, as far as the step size divides.
    """

    def __init__(
        self, prompts: Sequence[Prompt], *, num_prompts_per_step: int, seed: int, balance: bool
    ) -> None:
        self._pools: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            self._pools.setdefault(prompt.domain if balance else "", []).append(prompt)
        self._size = num_prompts_per_step
        self._seed = seed
        self._epochs: dict[str, int] = {}
        self._orders: dict[str, np.ndarray] = {}

    def take(self, step: int) -> list[Prompt]:
        """The global list of prompts of ``step``, the same on every rank."""
        names = sorted(self._pools)
        first = step * self._size
        # prompt number n of the run is the (n div D)-th of domain n mod D
        return [
            self._draw(names[number % len(names)], number // len(names))
            for number in range(first, first + self._size)
        ]

    def _draw(self, name: str, number: int) -> Prompt:
        pool = self._pools[name]
        epoch, index = divmod(number, len(pool))
        if self._epochs.get(name) != epoch:
            self._epochs[name] = epoch
            self._orders[name] = _permutation(f"{self._seed}|{name}|{epoch}", len(pool))
        return pool[int(self._orders[name][index])]


def _permutation(key: str, size: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(seed)).permutation(size)
