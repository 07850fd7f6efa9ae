"""Small tokenizers with a chosen vocabulary, of both kinds that mopd reads."""

from __future__ import annotations

import json
import random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mopd.tokens.vocabulary import Vocabulary

EOS = "<|end|>"


def _merges(tokens: list[str], known: set[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """(every piece beyond ``known`` that the merges need, one merge for each of them)."""
    pieces, merges = [], []
    for token in sorted(tokens, key=len):
        begin = next(i for i in range(len(token), 0, -1) if token[:i] in known)
        while begin < len(token):
            end = next(i for i in range(len(token), begin, -1) if token[begin:i] in known)
            merges.append((token[:begin], token[begin:end]))
            pieces.append(token[:end])
            known.add(token[:end])
            begin = end
    return pieces, merges


def byte_level(
    tokens: list[str], *, specials: tuple[str, ...] = (), shuffle: int | None = None
) -> Vocabulary:
    """The 256 bytes, ``tokens`` with what their merges pass through, and the end of turn.

    ``shuffle`` is the seed of another order of the ids; the merges keep theirs.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    mapped = ["".join(piece for piece, _ in plain.pre_tokenize_str(token)) for token in tokens]
    pieces, merges = _merges(mapped, set(alphabet))
    names = [*alphabet, *pieces]
    if shuffle is not None:
        random.Random(shuffle).shuffle(names)
    vocab = {piece: i for i, piece in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = plain
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer, specials)


def metaspace(
    tokens: list[str], *, letters: str = "abcdefghijklmnopqrstuvwxyz0123456789 "
) -> Vocabulary:
    """``<0xHH>`` for every byte, ``letters``, ``tokens``, and the end of turn."""
    pieces = [f"<0x{b:02X}>" for b in range(256)]
    single = [c.replace(" ", "\u2581") for c in letters]
    longer, merges = _merges([t.replace(" ", "\u2581") for t in tokens], set(single))
    vocab = {p: i for i, p in enumerate([*pieces, *single, *longer])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    # the dummy prefix that SentencePiece puts before a text must not reach a continuation
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _finish(tokenizer, ())


def _finish(tokenizer: Tokenizer, specials: tuple[str, ...]) -> Vocabulary:
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (EOS, *specials)]
    )
    return Vocabulary(json.loads(tokenizer.to_str()), eos_id=tokenizer.token_to_id(EOS))


def spell(vocabulary: Vocabulary, ids: list[int]) -> list[str]:
    """Tokens as text, for asserts that people read."""
    return [vocabulary.token_bytes[i].decode(errors="replace") for i in ids]


def ids_of(vocabulary: Vocabulary, *pieces: str) -> list[int]:
    """Ids of tokens by their text, whatever the encoder would do."""
    return [vocabulary.by_bytes[piece.encode()] for piece in pieces]


def control_of(vocabulary: Vocabulary, text: str) -> int:
    """Id of a control token by its text."""
    return vocabulary.token_bytes.index(text.encode())
