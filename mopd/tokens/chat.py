"""Messages -> prompt ids, per tokenizer. Prompts are never aligned across templates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mopd.errors import ConfigError
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import Message


class ChatTokenizer:
    """A tokenizer with its chat template and its vocabulary in bytes."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template; "
                "add chat_template.jinja or a chat_template in tokenizer_config.json"
            )
        self._tokenizer = tokenizer
        self.vocabulary = Vocabulary.from_tokenizer(tokenizer)
        self.pad_id = int(
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )

    @classmethod
    def load(cls, path: str | Path) -> ChatTokenizer:
        """From a local Hugging Face directory; never runs code from it."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(str(path), trust_remote_code=False))

    @property
    def eos_id(self) -> int:
        return self.vocabulary.eos_id

    @property
    def eos_text(self) -> str:
        """How servers that speak in strings write the end of the turn."""
        return str(self._tokenizer.eos_token)

    def prompt_ids(self, messages: Sequence[Message]) -> np.ndarray:
        """[P] int32: the rendered template up to where the assistant begins to write.

        Raises:
            ConfigError: nothing was rendered; the first answer token would have no past.
        """
        text = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ConfigError(
                f"{self._tokenizer.name_or_path}: the chat template renders nothing for a prompt; "
                "its generation prompt needs at least one token"
            )
        return np.asarray(ids, dtype=np.int32)
