"""A tokenizer as the library uses it: ids and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mopd.errors import ArgumentError
from mopd.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A tokenizer seen as bytes; `load_tokenizer` makes one.

    ``vocabulary`` holds the bytes of every token (`mopd.tokens.vocabulary.Vocabulary`).
    """

    name: str
    vocabulary: Vocabulary

    @property
    def size(self) -> int:
        """V: logits have at least so many columns, and columns behind it count nothing."""
        return self.vocabulary.size

    @property
    def eos_id(self) -> int:
        """The token that ends a turn."""
        return self.vocabulary.eos_id

    def encode(self, text: str | bytes) -> np.ndarray:
        """[S] int32: ``text`` as a continuation, without special tokens.

        Raises:
            ArgumentError: the tokens would not spell the text byte by byte.
        """
        data = text.encode() if isinstance(text, str) else bytes(text)
        ids = self.vocabulary.encode(data)
        if data and not ids:
            raise ArgumentError(
                f"{self.name}: the text does not round-trip (the tokenizer normalises it, or lacks "
                "bytes of it); pass the ids that the model wrote to mopd.align_tokens"
            )
        return np.asarray(ids, dtype=np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The exact bytes of the tokens; the end of turn has none."""
        return self.vocabulary.decode(ids)

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, size={self.size})"


def load_tokenizer(
    source: str | Path | PreTrainedTokenizerBase, *, eos_token: str | None = None
) -> Tokenizer:
    """A tokenizer from a Hugging Face directory, or from one that is loaded already.

    Args:
        source: a local directory with ``tokenizer.json`` (its code is never run), or a fast
            tokenizer of transformers.
        eos_token: the token that ends a turn; None takes the tokenizer's own.
    Raises:
        ArgumentError: no such directory.
        ConfigError: no fast tokenizer, no end-of-turn token, or a kind that cannot spell any text.
    """
    if not isinstance(source, str | Path):
        return _of(source, eos_token)
    if not Path(source).is_dir():
        raise ArgumentError(
            f"tokenizer `{source}` is no directory; download the model and name its local folder"
        )
    from transformers import AutoTokenizer

    return _of(AutoTokenizer.from_pretrained(str(source), trust_remote_code=False), eos_token)


def _of(tokenizer: Any, eos_token: str | None) -> Tokenizer:
    vocabulary = Vocabulary.from_tokenizer(tokenizer, eos_token=eos_token)
    return Tokenizer(name=str(tokenizer.name_or_path or "tokenizer"), vocabulary=vocabulary)
