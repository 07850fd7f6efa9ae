"""Small fast tokenizers of transformers, as a notebook has them."""

from __future__ import annotations

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import mopd
from mopd.tokens.pieces import to_alphabet


def tokenizer(words: list[str], *, eos: str = "<end>") -> mopd.Tokenizer:
    """Byte-level: 256 bytes and ``words``, each merged from its characters in order."""
    vocab = {to_alphabet(bytes([b])): b for b in range(256)}
    merges: list[tuple[str, str]] = []
    for word in words:
        spelled = [to_alphabet(bytes([b])) for b in word.encode()]
        left = spelled[0]
        for right in spelled[1:]:
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
            left += right
    backend = Backend(BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    return mopd.load_tokenizer(fast)
