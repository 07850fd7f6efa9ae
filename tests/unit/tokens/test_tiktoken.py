"""A ranks file gives the ids and bytes that the merges behind it give."""

import base64
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mopd.errors import ConfigError
from mopd.tokens.tiktoken import load_tiktoken, read_ranks, tokenizer_spec
from mopd.tokens.vocabulary import Vocabulary
from tests.unit.tokens.trained import EOS, PAD, TEXTS, vocabulary

# what ByteLevel cuts words with
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WHOLE = r"[\s\S]+"


def write(path: Path, ranks: dict[bytes, int]) -> Path:
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items()]
    path.write_bytes(b"".join(lines))
    return path


def ranks_of(source: Vocabulary) -> dict[bytes, int]:
    return {
        data: index
        for index, data in enumerate(source.token_bytes)
        if data and not source.control[index]
    }


def load(path: Path, source: Vocabulary) -> Vocabulary:
    special = {EOS: source.eos_id, PAD: source.roles["pad"]}
    return load_tiktoken(
        path, pattern=WORDS, special_tokens=special, eos=EOS, roles={"pad": special[PAD]}
    )


def test_the_same_ids_and_bytes(tmp_path):
    source = vocabulary("byte_level")
    found = load(write(tmp_path / "x.tiktoken", ranks_of(source)), source)
    assert found.token_bytes == source.token_bytes
    assert (found.eos_id, found.roles, found.exact) == (source.eos_id, source.roles, True)
    assert (found.control == source.control).all()
    for text in [*TEXTS.values(), "", " the", "x" * 30, EOS]:
        data = text.encode()
        assert found.encode(data) == source.encode(data)
        assert found.decode(found.encode(data)) == data
    assert found.encode(b"the \xff\xf0\x9f fox") == source.encode(b"the \xff\xf0\x9f fox")


def merged(data: bytes, ranks: dict[bytes, int]) -> list[int]:
    """The definition: of all neighbours that make a token, the lowest rank merges first."""
    parts = [bytes([b]) for b in data]
    while True:
        pairs = [(ranks.get(a + b), n) for n, (a, b) in enumerate(pairwise(parts))]
        known = [(rank, n) for rank, n in pairs if rank is not None]
        if not known:
            return [ranks[part] for part in parts]
        _, n = min(known)
        parts[n : n + 2] = [parts[n] + parts[n + 1]]


SMALL = {bytes([b]): b for b in range(256)} | {
    token: 256 + n for n, token in enumerate([b"ab", b"ca", b"abc", b"aa", b"bb", b"bbc", b"aabb"])
}
EVERY_MERGE = Vocabulary(
    tokenizer_spec(SMALL, pattern=WHOLE, special_tokens={EOS: 300}), eos_id=300
)


@given(st.text(alphabet="abc", min_size=1, max_size=14))
def test_neighbours_merge_by_the_rank_of_what_they_make(text):
    data = text.encode()
    expected = [SMALL[data]] if data in SMALL else merged(data, SMALL)
    assert EVERY_MERGE.encode(data) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"!!!! 0\n", "x.tiktoken:1: wanted a base64 token"),
        (b"QQ== 0\nQg==\n", "x.tiktoken:2: wanted a base64 token"),
        (b"QQ== zero\n", "x.tiktoken:1: wanted a base64 token"),
        (b"QQ== 0\n", "255 bytes have no token"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, message):
    path = tmp_path / "x.tiktoken"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_ranks(path)


def test_repeated_ranks_and_ids_are_refused(tmp_path):
    ranks = {bytes([b]): b for b in range(256)}
    with pytest.raises(ConfigError, match="1 ranks are repeated"):
        read_ranks(write(tmp_path / "x", ranks | {b"ab": 7}))
    path = write(tmp_path / "y", ranks)
    with pytest.raises(ConfigError, match=r"share ids.*\[7\]"):
        load_tiktoken(path, pattern=WORDS, special_tokens={EOS: 7}, eos=EOS)
    with pytest.raises(ConfigError, match="none of the special tokens"):
        load_tiktoken(path, pattern=WORDS, special_tokens={PAD: 256}, eos=EOS)
