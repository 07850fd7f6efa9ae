"""A row's chat as what the student reads and, where answers come with the data, what it writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mopd.config.schema import DataSection
from mopd.errors import ConfigError
from mopd.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """An assistant turn with what stands before it; ``response`` None: the student writes it."""

    messages: tuple[Message, ...]
    response: str | None
    number: int | None = None  # of several of one row
    is_last: bool = True


def turns(row: Mapping[str, Any], where: str, *, data: DataSection, answered: bool) -> list[Turn]:
    """The turns of a row that are samples.

    A last message of the assistant is an answer, never a part of the prompt: without ``answered``
    the student writes its own in that place.

    ``answered``: a chat that ends with an assistant's message is a prompt and its answer. With
    ``train_on=all`` every assistant message is a sample of its own behind the messages before it,
    so its chat template reads each of them as it would have been written.

    Raises:
        ConfigError: ``where``, the key, and what was expected.
    """
    messages = _prompt(row, where, data)
    response = _response(row, where, data.response_key)
    if not answered:
        return [Turn(messages=_asked(messages, where, data), response=response)]
    if response is not None:
        messages = (*messages, {"role": "assistant", "content": response})
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not spoken or spoken[-1] != len(messages) - 1:
        return [Turn(messages=messages, response=None)]
    if data.train_on == "last":
        spoken = spoken[-1:]
    if spoken[0] == 0:
        raise _begins(where, data)
    return [
        Turn(
            messages=messages[:i],
            response=messages[i]["content"],
            number=n if len(spoken) > 1 else None,
            is_last=i == spoken[-1],
        )
        for n, i in enumerate(spoken, start=1)
    ]


def _asked(messages: tuple[Message, ...], where: str, data: DataSection) -> tuple[Message, ...]:
    if messages[-1]["role"] != "assistant":
        return messages
    if len(messages) == 1:
        raise _begins(where, data)
    return messages[:-1]


def _begins(where: str, data: DataSection) -> ConfigError:
    return ConfigError(
        f"{where}: {data.messages_key!r} begins with the assistant; put a message before it"
    )


def _prompt(row: Mapping[str, Any], where: str, data: DataSection) -> tuple[Message, ...]:
    if data.prompt_key is None:
        return _messages(row.get(data.messages_key), where, data.messages_key)
    text = row.get(data.prompt_key)
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{where}: {data.prompt_key!r} (data.prompt_key) must be a text")
    return ({"role": "user", "content": text},)


def _messages(messages: Any, where: str, key: str) -> tuple[Message, ...]:
    good = isinstance(messages, list) and messages
    if not good or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    ):
        raise ConfigError(
            f"{where}: {key!r} must be a list of objects with 'role' and 'content' strings "
            "(data.messages_key names the field, data.prompt_key a plain text)"
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def _response(row: Mapping[str, Any], where: str, key: str) -> str | None:
    response = row.get(key)
    if response is not None and not isinstance(response, str):
        raise ConfigError(f"{where}: {key!r} must be a string, the answer to train on")
    return response
