"""Synthetic texts, and byte-level tokenizers of any size that know different parts of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mopd.tokens.vocabulary import Vocabulary

EOS = "<|end|>"
DOMAINS = ("prose", "code", "cjk", "emoji")
_SHARE = {"prose": 0.68, "code": 0.17, "cjk": 0.13, "emoji": 0.02}
_EMOJI = "😀😂🥰😎🤔🙏🔥🎉💡🚀🌍🐍🍀🎵📈🧪👩👨👧💻"


def lexicon(size: int, *, seed: int = 0) -> dict[str, list[str]]:
    """Per domain: distinct strings, frequent ones first; ``size`` of them in all."""
    generator = np.random.default_rng(seed)
    return {name: _distinct(name, int(size * _SHARE[name]), generator) for name in DOMAINS}


def _distinct(domain: str, count: int, generator: np.random.Generator) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found.setdefault(_string(domain, generator))
    return list(found)


def _string(domain: str, generator: np.random.Generator) -> str:
    if domain == "prose":
        return " " * int(generator.random() < 0.7) + _word(generator, 1, 5)
    if domain == "code":
        kind = int(generator.integers(4))
        if kind == 0:
            return str(generator.integers(10 ** generator.integers(1, 6)))
        if kind == 1:
            return "\n" * int(generator.integers(1, 4)) + " " * int(generator.integers(0, 33))
        joint = "_" if kind == 2 else "."
        return joint.join(_word(generator, 1, 3) for _ in range(2))
    if domain == "cjk":
        return "".join(map(chr, generator.integers(0x4E00, 0x9FA5, generator.integers(1, 4))))
    picked = generator.integers(len(_EMOJI), size=generator.integers(1, 5))
    return "\u200d".join(_EMOJI[i] for i in picked)


def _word(generator: np.random.Generator, low: int, high: int) -> str:
    syllables = generator.integers(0, (19, 5, 7), size=(generator.integers(low, high), 3))
    ends = ("", "", "", "n", "r", "s", "l")
    return "".join("bcdfghjklmnpqrstvwz"[c] + "aeiou"[v] + ends[e] for c, v, e in syllables)


def text(words: dict[str, list[str]], domain: str, count: int, *, seed: int) -> str:
    """``count`` strings of one domain, frequent ones more often."""
    generator = np.random.default_rng(seed)
    pool = words[domain]
    picked = (len(pool) ** generator.random(count)).astype(np.int64) - 1
    return "".join(pool[i] for i in picked)


def tokenizer(words: dict[str, list[str]], size: int, *, seed: int, digits: bool) -> Vocabulary:
    """About 80 % of ``words``, cut at ``size`` tokens; ``digits`` splits numbers into digits."""
    generator = np.random.default_rng(seed)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    known = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    ranked = [(i / len(pool), word) for pool in words.values() for i, word in enumerate(pool)]
    for _, word in sorted(ranked):
        if generator.random() < 0.8:
            _learn(plain.pre_tokenize_str(word)[0][0], known, merges)
        if len(known) >= size - 1:
            break
    excess = max(0, len(known) - (size - 1))
    kept = dict(list(known.items())[: len(known) - excess])
    built = Tokenizer(models.BPE(vocab=kept, merges=merges[: len(merges) - excess]))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    first = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    built.pre_tokenizer = pre_tokenizers.Sequence([*first, split])
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    return Vocabulary(json.loads(built.to_str()), eos_id=built.token_to_id(EOS))


def _learn(token: str, known: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Merges that build ``token`` from its longest known prefix on."""
    begin = next(i for i in range(len(token), 0, -1) if token[:i] in known)
    while begin < len(token):
        end = next(i for i in range(len(token), begin, -1) if token[begin:i] in known)
        merges.append((token[:begin], token[begin:end]))
        known[token[:end]] = len(known)
        begin = end


def token_ids(vocabulary: Vocabulary, content: str) -> np.ndarray:
    """[S] int32."""
    return np.asarray(vocabulary.encode(content.encode()), dtype=np.int32)


def cpu_model() -> str:
    """The processor in words, as the kernel names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
