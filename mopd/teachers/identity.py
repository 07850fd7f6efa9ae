"""Does a server cut text into tokens as the tokenizer does that the recipe names for it?"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from mopd.errors import TeacherError
from mopd.serving.endpoint import Endpoint
from mopd.tokens.chat import ChatTokenizer

CHECK_S = 15.0  # no further text is asked after that
SYSTEM = {"role": "system", "content": "Answer in 1 line."}
USER = {"role": "user", "content": "Write 3 words about 42 trees, then stop."}
ASSISTANT = {"role": "assistant", "content": "Oak, elm, ash."}
# (messages, whether the assistant is to write next)
CHATS = (
    ((USER,), True),
    ((USER,), False),
    ((SYSTEM, USER), True),
    ((USER, ASSISTANT), False),
    ((USER, ASSISTANT, USER), True),
)


class Identity:
    """What one tokenizer makes of fixed texts and chats, to hold against what a server says.

    A server that has no ``/tokenize`` is not asked: then only its scores can give it away.
    """

    def __init__(self, name: str, tokenizer: ChatTokenizer) -> None:
        self._name = name
        self._tokenizer = tokenizer
        self._own: dict[int, np.ndarray] = {}

    @cached_property
    def _texts(self) -> list[str]:
        return self._tokenizer.probe_texts()

    async def check(self, endpoint: Endpoint, *, whole: bool) -> None:
        """Asks for all texts, or without ``whole`` for the most telling ones, and for the chats.

        Raises:
            TeacherError: one line: what the server reads otherwise, and the remedy.
            ServerError: it did not answer.
        """
        await self.check_texts(endpoint, whole=whole)
        await self.check_chats(endpoint)

    async def check_texts(self, endpoint: Endpoint, *, whole: bool) -> None:
        """Merges, pieces, added tokens, normalizer and pre-tokenizer."""
        if await endpoint.tokenize("x") is None:
            return
        clock = asyncio.get_running_loop().time
        end = clock() + CHECK_S
        for number, text in enumerate(self._texts if whole else self._texts[:1]):
            its = await endpoint.tokenize(text)
            if its is None:
                raise self._error(endpoint, f"refuses {len(text)} characters on /tokenize")
            if not np.array_equal(own := self._text_ids(number), its):
                raise self._error(endpoint, self._explain(own, its))
            if clock() >= end:
                return

    def _text_ids(self, number: int) -> np.ndarray:
        if number not in self._own:
            ids = self._tokenizer.text_ids(self._texts[number])
            self._own[number] = np.asarray(ids, dtype=np.int64)
        return self._own[number]

    def _explain(self, own: np.ndarray, its: np.ndarray) -> str:
        shared = min(len(own), len(its))
        differs = np.flatnonzero(own[:shared] != its[:shared])
        at = int(differs[0]) if len(differs) else shared
        if at == len(own):
            return "reads more tokens in a fixed text than its tokenizer here"
        index = int(own[at])
        said = f"token {its[at]}" if at < len(its) else "nothing"
        if self._tokenizer.is_added(index):
            return (
                f"reads {said} where its tokenizer here has the added token "
                f"{self._tokenizer.token(index)!r} ({index}): it has another set of added tokens"
            )
        return (
            f"reads {said} where its tokenizer here reads {self._tokenizer.token(index)!r} "
            f"({index}): it has other merges or pieces"
        )

    async def check_chats(self, endpoint: Endpoint) -> None:
        """The chat template, once the texts are known to agree."""
        said = [await endpoint.tokenize(m, add_generation_prompt=add) for m, add in CHATS]
        if all(its is None for its in said):
            return
        for (messages, add), its in zip(CHATS, said, strict=True):
            own = self._tokenizer.chat_ids(messages, add_generation_prompt=add)
            if own != (None if its is None else its.tolist()):
                raise self._error(
                    endpoint,
                    f"writes a chat of {_roles(messages)} with other tokens: it has another chat "
                    "template",
                )

    def _error(self, endpoint: Endpoint, text: str) -> TeacherError:
        return TeacherError(
            f"teachers.{self._name}: {endpoint.url} {text}; name its own files: "
            f"teachers.{self._name}.tokenizer"
        )


def _roles(messages: tuple[Mapping[str, str], ...]) -> str:
    return ", ".join(message["role"] for message in messages)
