"""Prompts from data files, routed to teachers, drawn in an order that only the seed decides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mopd.config.check_evaluate import metric_user
from mopd.config.schema import DataSection, DistillationSection, RunConfig, TeacherSection
from mopd.errors import ConfigError
from mopd.runtime.payloads import active_teachers
from mopd.runtime.rows import Row, read_rows
from mopd.runtime.turns import turns
from mopd.teachers.base import teacher_messages
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Message, Prompt


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

    def private(
        self,
        row: Mapping[str, Any],
        messages: Sequence[Message],
        names: Sequence[str],
        where: str,
    ) -> dict[str, str]:
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
            if spoken and not any(message["role"] == "user" for message in messages):
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


def read_prompts(
    path: Path | str,
    *,
    router: Router,
    teacher_key: str,
    data: DataSection | None = None,
    answered: bool = False,
    cache: Path | None = None,
) -> list[Prompt]:
    """Every row of the data files at ``path`` as a `Prompt`, or several (`mopd.runtime.turns`).

    A row has ``messages`` (role and content), and optionally ``id``, ``answer``, ``response`` (an
    answer for off-policy training), ``top_k``, the routing field and what teachers'
    ``privileged.field`` names. Rows without an id are named by file and line. The rows of a mapped
    file are not copied; what is kept of each is its `Prompt`.

    Args:
        data: names the fields; None takes the usual names.
        answered: answers come with the rows, as their ``response`` or last message.
        cache: see `read_rows`.
    Raises:
        ConfigError: with file and line, what is wrong and what was expected.
    """
    data = data or DataSection()
    prompts: list[Prompt] = []
    seen: set[str] = set()
    columns = (data.prompt_key or data.messages_key,)
    for row in read_rows(str(path), columns=columns, cache=cache):
        for prompt in _prompts(row, router, teacher_key, data, answered=answered):
            if prompt.id in seen:
                raise ConfigError(
                    f"{row.where}: id {prompt.id!r} is used twice; ids must be unique"
                )
            seen.add(prompt.id)
            _check_characters(prompt, row.where, teacher_key)
            prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"{path}: no rows; one JSON object a line with 'messages' is expected")
    return prompts


def _prompts(
    row: Row, router: Router, teacher_key: str, data: DataSection, *, answered: bool
) -> Iterator[Prompt]:
    values, where = row.values, row.where
    name = values.get("id")
    domain = values.get(teacher_key)
    domain = "default" if domain is None else str(domain)
    answer = values.get(data.answer_key)
    found = turns(values, where, data=data, answered=answered)
    teachers = router.route(domain, where)
    for turn in found:
        prompt_id = row.name if name is None else str(name)
        yield Prompt(
            id=prompt_id if turn.number is None else f"{prompt_id}#{turn.number}",
            messages=turn.messages,
            domain=domain,
            answer=None if answer is None or not turn.is_last else str(answer),
            teachers=teachers,
            top_k=router.top_k(values, where),
            response=turn.response,
            private=router.private(values, turn.messages, teachers, where),
        )


def check_answers(key: str, prompts: Sequence[Prompt], *, data: DataSection) -> None:
    """Raises ConfigError at the first of rows that must have an answer and have none."""
    for prompt in prompts:
        if not prompt.response:
            fields = f"{data.response_key!r} (data.response_key)"
            if data.prompt_key is None:
                fields += f" or a last message of the assistant in {data.messages_key!r}"
            raise ConfigError(f"{key}: row {prompt.id} has no answer to train on; give it {fields}")


def check_measurable(config: RunConfig, heldout: Sequence[Prompt]) -> None:
    """Raises ConfigError where somebody goes by an accuracy that no held-out row tells."""
    user = metric_user(config)
    if user is None or config.evaluate.metric != "accuracy":
        return
    if all(prompt.answer is None for prompt in heldout):
        raise ConfigError(
            f"evaluate.metric=accuracy: {user} goes by it, and no row of data.heldout_path has "
            f"{config.data.answer_key!r} (data.answer_key); add it, or choose another metric"
        )


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
