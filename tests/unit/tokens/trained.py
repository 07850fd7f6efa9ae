"""Tokenizers of every kind, trained on a small mixed corpus: seconds for all of them together."""

from __future__ import annotations

import json
from functools import lru_cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from mopd.tokens.vocabulary import Vocabulary

TEXTS = {
    "prose": "The quick brown fox jumps over the lazy dog, and then it sleeps until noon. "
    "Nobody knows why the river is so quiet today; perhaps the rain has stopped.",
    "code": "def total(values):\n    found = 0\n    for value in values:\n"
    "        found += value * 2\n    return found  # 1234 and 56\n",
    "cjk": "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8"
    "\u3068\u4e2d\u6587\u6587\u672c\u3002\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002",
    "emoji": "well done \U0001f60a\U0001f389 ship it \U0001f680 "
    "\U0001f469\u200d\U0001f4bb\u2764\ufe0f",
    "accents": "Caf\u00e9 na\u00efve \u00c5ngstr\u00f6m, e\u0301lan, \u00dcber, \u010desk\u00fd",
    "ligatures": "\ufb01ne \ufb02ow \ufb03x, \u2460 \u00b2 \u33a1 \uff21\uff22\uff23 \u337f",
}
EOS, UNKNOWN, PAD = "<|end|>", "[UNK]", "[PAD]"
SIZE = 420
KINDS = ("byte_level", "sentencepiece", "unigram", "wordpiece")


def _corpus() -> list[str]:
    words = [word for text in TEXTS.values() for word in text.split()]
    return [*TEXTS.values(), *(" ".join(words[k:] + words[:k]) for k in range(0, len(words), 3))]


@lru_cache
def vocabulary(kind: str) -> Vocabulary:
    """One of `KINDS`."""
    tokenizer, trainer = {
        "byte_level": _byte_level,
        "sentencepiece": _sentencepiece,
        "unigram": _unigram,
        "wordpiece": _wordpiece,
    }[kind]()
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (EOS, PAD)])
    spec = json.loads(tokenizer.to_str())
    if kind == "sentencepiece":  # the trainer takes byte tokens as special ones only
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"][:3] != "<0x"]
    pad = tokenizer.token_to_id(PAD)
    return Vocabulary(spec, eos_id=tokenizer.token_to_id(EOS), roles={"pad": pad})


def _byte_level() -> tuple[Tokenizer, trainers.BpeTrainer]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return tokenizer, trainers.BpeTrainer(
        vocab_size=SIZE, initial_alphabet=alphabet, show_progress=False
    )


def _sentencepiece() -> tuple[Tokenizer, trainers.BpeTrainer]:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fallback = [f"<0x{b:02X}>" for b in range(256)]
    return tokenizer, trainers.BpeTrainer(
        vocab_size=SIZE + 100,
        special_tokens=["<unk>", *fallback],
        limit_alphabet=60,
        max_token_length=12,
        show_progress=False,
    )


def _unigram() -> tuple[Tokenizer, trainers.UnigramTrainer]:
    tokenizer = Tokenizer(models.Unigram())
    squeeze = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), squeeze])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=SIZE, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )


def _wordpiece() -> tuple[Tokenizer, trainers.WordPieceTrainer]:
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(
        vocab_size=SIZE, special_tokens=[UNKNOWN], show_progress=False
    )
