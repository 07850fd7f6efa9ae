"""Messages -> prompt ids, per tokenizer. Prompts are never aligned across templates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mopd.errors import ConfigError
from mopd.tokens.probe import probe_texts
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import Message

ANSWER = "Oak, elm, ash."
FINISHED = (
    {"role": "user", "content": "Name 3 trees"},
    {"role": "assistant", "content": ANSWER},
)


class ChatTokenizer:
    """A tokenizer with its chat template and its vocabulary in bytes.

    Args:
        eos_token: the token that ends a turn; None takes the tokenizer's own. The template still
            writes what it always does.
    """

    def __init__(self, tokenizer: Any, *, eos_token: str | None = None) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template; "
                "add chat_template.jinja or a chat_template in tokenizer_config.json"
            )
        self._tokenizer = tokenizer
        self.vocabulary = Vocabulary.from_tokenizer(tokenizer, eos_token=eos_token)
        pad_id = tokenizer.pad_token_id
        self.pad_id = int(self.eos_id if pad_id is None else pad_id)

    @classmethod
    def load(cls, path: str | Path, *, eos_token: str | None = None) -> ChatTokenizer:
        """From a local Hugging Face directory; never runs code from it."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        return cls(tokenizer, eos_token=eos_token)

    @property
    def eos_id(self) -> int:
        return self.vocabulary.eos_id

    @property
    def eos_text(self) -> str:
        """How servers that speak in strings write the end of the turn."""
        return self.token(self.eos_id)

    def token(self, index: int) -> str:
        """The tokenizer's own name of a token."""
        return str(self._tokenizer.convert_ids_to_tokens(index))

    def is_added(self, index: int) -> bool:
        """Whether a token stands beside the model's own vocabulary, as control tokens do."""
        return index in self._tokenizer.added_tokens_decoder

    def prompt_ids(self, messages: Sequence[Message]) -> np.ndarray:
        """[P] int32: the rendered template up to where the assistant begins to write.

        Raises:
            ConfigError: the template refuses the messages, or nothing was rendered; the first
                answer token would have no past.
        """
        from jinja2 import TemplateError

        try:
            text = self._rendered(messages, add_generation_prompt=True)
        except (TemplateError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ConfigError(
                f"{self._tokenizer.name_or_path}: the chat template refuses messages of {roles} "
                f"({error}); change their roles, or the template"
            ) from error
        ids = self.text_ids(text)
        if not ids:
            raise ConfigError(
                f"{self._tokenizer.name_or_path}: the chat template renders nothing for a prompt; "
                "its generation prompt needs at least one token"
            )
        return np.asarray(ids, dtype=np.int32)

    def chat_ids(
        self, messages: Sequence[Message], *, add_generation_prompt: bool
    ) -> list[int] | None:
        """Token ids of any rendered chat; None where the template refuses it."""
        from jinja2 import TemplateError

        try:
            text = self._rendered(messages, add_generation_prompt=add_generation_prompt)
        except TemplateError:
            return None
        return self.text_ids(text)

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text in which control tokens count as such."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def probe_texts(self) -> list[str]:
        """What to cut into tokens to tell this tokenizer from another; see `mopd.tokens.probe`."""
        return probe_texts(json.loads(self._tokenizer.backend_tokenizer.to_str()))

    def turn_end(self) -> int | None:
        """The control token that the template writes behind a finished answer, spaces aside.

        None where this cannot be told: the template changes the answer, refuses the chat, or
        writes plain text or nothing behind it.
        """
        from jinja2 import TemplateError

        try:
            text = self._rendered(FINISHED, add_generation_prompt=False)
        except TemplateError:
            return None
        if text.count(ANSWER) != 1:
            return None
        ids = self.text_ids(text.partition(ANSWER)[2].lstrip())
        ends = bool(ids) and (self.is_added(ids[0]) or ids[0] == self.eos_id)
        return ids[0] if ends else None

    def check_end(self, key: str) -> None:
        """Raises ConfigError where the template of ``key`` ends a turn with another token."""
        end = self.turn_end()
        if end is not None and end != self.eos_id:
            raise ConfigError(
                f"{key}: its chat template ends a turn with {self.token(end)}, and its tokenizer's "
                f"eos_token is {self.eos_text}; set {key}.eos_token={self.token(end)}"
            )

    def _rendered(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
