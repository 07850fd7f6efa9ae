"""Tokenizers that normalise: where their tokens end in the original bytes."""

import json
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from mopd.errors import ConfigError
from mopd.projection import ProjectionOptions, build_projection
from mopd.tokens import vocabulary as module
from mopd.tokens.reading import common_runs, offset_ends, string_ends
from mopd.tokens.table import ByteTable
from mopd.tokens.utf8 import canonical, character_ends, characters
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import EXACT
from tests.unit.tokens.trained import EOS, KINDS, PAD, TEXTS, UNKNOWN, vocabulary


def split(*pieces: str) -> list[bytes]:
    return [piece.encode() for piece in pieces]


@pytest.mark.parametrize(
    ("text", "offsets", "pieces", "expected"),
    [
        ("ab cd", [(0, 2), (3, 5)], split("ab", "cd"), [2, 5]),
        ("ab  \n", [(0, 2)], split("ab"), [5]),  # dropped at the end: the last token's
        ("ab?", [(0, 2)], split("ab"), [2]),  # not dropped: nobody's
        ("\u4f60\u597d", [(0, 1), (1, 2)], split("\u4f60", "\u597d"), [3, 6]),
        ("\ufb01n", [(0, 1), (0, 1), (1, 2)], split("f", "i", "n"), [0, 3, 4]),
        ("\ufb01n", [(0, 1), (0, 2)], split("f", "in"), [0, 4]),  # ends inside the ligature
        ("x\ufb01", [(0, 1), (1, 2), (1, 2)], split("x", "f", "i"), [1, 1, 4]),
        ("\u00e9", [(0, 1), (0, 1)], [b"\xc3", b"\xa9"], [1, 2]),  # its own bytes: exact
        ("\u00c9", [(0, 1), (0, 1)], [b"\xc3", b"\xa9"], [0, 2]),  # as many, but others
        ("\u0133", [(0, 1), (0, 1)], split("i", "j"), [0, 2]),  # as many, but others
        ("e\u0301x", [(0, 1), (2, 3)], split("e", "x"), [3, 4]),  # the accent stays behind its e
        ("", [], [], []),
    ],
)
def test_offsets_become_bytes(text, offsets, pieces, expected):
    found = offset_ends(text, offsets, pieces)
    assert found is not None and found.tolist() == expected


@pytest.mark.parametrize(
    "offsets", [[(0, 0), (0, 0)], [(2, 3), (0, 1)], [(0, 1), (1, 9)], [(-1, 1), (1, 2)]]
)
def test_offsets_that_make_no_sense_are_refused(offsets):
    assert offset_ends("abc", offsets, split("a", "b")) is None


@pytest.mark.parametrize(
    ("text", "pieces", "expected"),
    [
        ("The  Fox ", split("the", "fox"), [3, 9]),
        ("\ufb01ne", split("f", "i", "ne"), [0, 3, 5]),
        ("caf\u00e9 x", split("cafe", "x"), [5, 7]),
        ("cafe\u0301 x", split("cafe", "x"), [6, 8]),
        ("one two three", split("one", "[UNK]", "three"), [3, 7, 13]),
        ("\u4f60\u597d", [b"\xe4\xbd", b"\xa0", b"\xe5\xa5\xbd"], [0, 3, 6]),
        ("abc", split("xyz"), [0]),
        ("  ", split("x"), [0]),
        ("", split("a"), [0]),
    ],
)
def test_strings_become_bytes(text, pieces, expected):
    assert string_ends(text.encode(), pieces).tolist() == expected


@given(st.text(max_size=40), st.sets(st.integers(1, 40), max_size=12))
def test_strings_find_every_end_of_an_equal_text(text, cuts):
    edges = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    parts = [text[a:b] for a, b in pairwise(edges)]
    ends = string_ends(text.encode(), split(*parts)).tolist()
    assert ends == sorted(ends)
    exact = np.cumsum([len(p.encode()) for p in parts]).tolist()
    for end, own, part in zip(ends, exact, parts, strict=True):
        # what is dropped (spaces, accents) may stand on either side of the end
        low, high = sorted((end, own))
        between = text.encode()[low:high].decode()
        assert canonical(between) == "" or not canonical(part)


@given(st.text(alphabet="ab", max_size=60), st.text(alphabet="ab", max_size=60))
def test_runs_are_equal_and_in_order(left, right):
    before = (0, 0)
    for i, j, size in common_runs(left, right):
        assert size > 0 and left[i : i + size] == right[j : j + size]
        assert i >= before[0] and j >= before[1]
        before = (i + size, j + size)
    if left == right and left:
        assert common_runs(left, right) == [(0, 0, len(left))]


@given(st.binary(max_size=40))
def test_characters_count_bytes(data):
    ends = character_ends(characters(data)).tolist()
    assert (ends[-1] if ends else 0) == len(data)


def test_the_table_spells_what_the_tokens_do():
    for kind in KINDS:
        found = vocabulary(kind)
        ids = np.random.default_rng(0).integers(0, found.size + 3, 200)
        table = found.table
        rows = table.rows(ids)
        assert table.spell(rows, table.ends(rows)).tobytes() == found.decode(ids)
        ends = np.cumsum([len(found.decode([i])) for i in ids])
        assert found.byte_ends(ids).tolist() == ends.tolist()
        assert found.lengths.tolist() == [len(data) for data in found.token_bytes]
        assert found.table is table  # built once
    empty = ByteTable.of([])
    assert empty.spell(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)).tobytes() == b""


def test_what_each_kind_says_of_its_bytes():
    assert {kind: vocabulary(kind).kind for kind in KINDS} == {
        "byte_level": "byte_level",
        "sentencepiece": "sentencepiece",
        "unigram": "sentencepiece",
        "wordpiece": "wordpiece",
    }
    exact = {kind for kind in KINDS if vocabulary(kind).exact}
    assert exact == {"byte_level", "sentencepiece"}


def test_pieces_of_words_have_no_marks():
    spelled = set(vocabulary("wordpiece").token_bytes)
    assert b"the" in spelled
    assert not any(data.startswith(b"##") and len(data) > 3 for data in spelled)


def test_unknown_text_is_not_spelled():
    found = vocabulary("wordpiece")
    assert found.control[found._unknown]
    assert found.encode_many([b"the", b" the", "\u0416".encode(), UNKNOWN.encode(), b"\xff"]) == [
        [found.token_bytes.index(b"the")],
        [],  # the space would be lost
        [],
        [],
        [],
    ]


def test_text_that_spells_the_unknown_token_is_not_it():
    vocab = {UNKNOWN: 0, "a": 1, EOS: 2}
    found = Vocabulary(spec_of(models.WordPiece(vocab=vocab, unk_token=UNKNOWN)), eos_id=2)
    assert found.encode(UNKNOWN.encode()) == []
    assert not found.says([0], UNKNOWN.encode())
    assert found.says([1], b"a")


@pytest.mark.parametrize("kind", KINDS)
@given(st.binary(max_size=30))
def test_any_bytes_are_read_or_refused(kind, data):
    reading = vocabulary(kind).read(data)
    ends = reading.byte_ends.tolist()
    assert len(ends) == len(reading.ids)
    assert ends == sorted(ends) and all(0 <= end <= len(data) for end in ends)
    if reading.method == "bytes":
        assert vocabulary(kind).decode(reading.ids) == (data if reading.ids else b"")


@pytest.mark.parametrize("name", TEXTS)
def test_broken_offsets_fall_back_to_strings(name, monkeypatch):
    data = TEXTS[name].encode()
    by_offsets = vocabulary("wordpiece").read(data)
    monkeypatch.setattr(module, "offset_ends", lambda *_: None)
    by_strings = vocabulary("wordpiece").read(data)
    assert by_strings.ids == by_offsets.ids
    if by_offsets.method == "bytes":
        assert by_strings.method == "bytes"
        return
    assert (by_offsets.method, by_strings.method) == ("offsets", "strings")
    agreed = set(by_strings.byte_ends.tolist()) & set(by_offsets.byte_ends.tolist())
    assert len(agreed) >= 0.9 * len(set(by_offsets.byte_ends.tolist()))


def test_frames_and_roles():
    found = vocabulary("wordpiece")
    assert found.roles == {"pad": found.token_bytes.index(PAD.encode())}
    expected = {found.roles["pad"], found.eos_id, found.size}
    assert set(np.flatnonzero(found.unaligned).tolist()) == expected
    assert found.token_bytes[found.roles["pad"]] == PAD.encode()  # a model that writes it is read


def test_sentencepiece_with_a_mark_in_the_text_reads_by_offsets():
    found = vocabulary("sentencepiece")
    data = "the \u2581 fox".encode()
    assert found.encode(data) == []  # its tokens would say a space
    reading = found.read(data)
    assert (reading.method, reading.byte_ends[-1]) == ("offsets", len(data))


@pytest.mark.parametrize("teacher", ["unigram", "wordpiece"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_projection_between_kinds_is_stochastic(teacher, reverse):
    pair = (vocabulary("byte_level"), vocabulary(teacher))
    student, other = pair[::-1] if reverse else pair
    built = build_projection(student, other, ProjectionOptions(max_length=4, gamma=0.1))
    sums = np.add.reduceat(built.val.astype(np.float64), built.crow[:-1])
    assert np.abs(sums - 1).max() < 1e-6
    shared = np.flatnonzero(built.common >= 0)
    assert len(shared) > 50
    for column in shared.tolist():
        if column != other.eos_id:
            assert student.token_bytes[built.common[column]] == other.token_bytes[column]
    letter = student.by_bytes[b"t"]
    row = slice(built.crow[letter], built.crow[letter + 1])
    assert built.kind[letter] == EXACT
    assert built.col[row].tolist() == [other.by_bytes[b"t"]]


def spec_of(model, normalizer=None, pre_tokenizer=None) -> dict:
    tokenizer = Tokenizer(model)
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    return json.loads(tokenizer.to_str())


LETTERS = {c: n for n, c in enumerate("abcdefgh\u00e9 \"?'")}


@pytest.mark.parametrize(
    ("normalizer", "text"),
    [
        (normalizers.NFKC(), "\uff41\u00e9"),
        (normalizers.Lowercase(), "AbC"),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "a\u0301b\u00e9"),
        (normalizers.Replace("``", '"'), "``ab``"),
        (normalizers.Strip(), "  ab "),
        (normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()]), " AB"),
    ],
)
def test_every_normaliser_gives_offsets(normalizer, text):
    vocab = {**LETTERS, "<unk>": 50, EOS: 51}
    spec = spec_of(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"), normalizer)
    found = Vocabulary(spec, eos_id=51)
    assert (found.kind, found.exact) == ("plain", False)
    reading = found.read(text.encode())
    assert reading.method == "offsets"
    assert reading.byte_ends[-1] == len(text.encode())
    assert found.says(reading.ids, text.encode())


def test_a_byte_level_tokenizer_that_composes_is_read_by_offsets():
    tokenizer = spec_of(
        models.BPE(
            vocab={c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
            merges=[],
        ),
        normalizers.NFC(),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    found = Vocabulary(tokenizer, eos_id=0)
    assert not found.exact
    reading = found.read("xe\u0301y".encode())
    composed = unicodedata.normalize("NFC", "xe\u0301y").encode()
    assert found.decode(reading.ids) == composed
    assert reading.byte_ends.tolist() == [1, 1, 4, 5]


ALPHABET = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    ("before", "exact"),
    [
        (pre_tokenizers.Digits(individual_digits=True), True),
        (pre_tokenizers.Split(" ", "isolated"), True),
        (pre_tokenizers.Punctuation("isolated"), True),
        (pre_tokenizers.Split(" ", "removed"), False),
        (pre_tokenizers.Punctuation("removed"), False),
        (pre_tokenizers.Whitespace(), False),
    ],
)
def test_a_step_that_drops_text_is_not_exact(before, exact):
    steps = pre_tokenizers.Sequence([before, BYTES])
    spec = spec_of(models.BPE(vocab=ALPHABET, merges=[]), pre_tokenizer=steps)
    assert Vocabulary(spec, eos_id=0).exact is exact


def test_missing_bytes_and_greedy_tokens_are_not_exact():
    some = {c: n for n, c in enumerate(sorted(ALPHABET)[:-1])}
    spec = spec_of(models.BPE(vocab=some, merges=[]), pre_tokenizer=BYTES)
    assert not Vocabulary(spec, eos_id=0).exact
    tokenizer = Tokenizer(models.BPE(vocab=ALPHABET, merges=[]))
    tokenizer.pre_tokenizer = BYTES
    tokenizer.add_tokens([AddedToken("<x>", lstrip=True)])
    found = Vocabulary(json.loads(tokenizer.to_str()), eos_id=0)
    assert not found.exact  # it takes the spaces before it
    reading = found.read(b"a  <x>")
    assert (reading.method, reading.byte_ends.tolist()) == ("offsets", [1, 6])


def test_words_as_tokens_are_refused():
    with pytest.raises(ConfigError, match=r"WordLevel.*BPE, Unigram, WordPiece"):
        Vocabulary(spec_of(models.WordLevel(vocab={"a": 0}, unk_token="a")), eos_id=0)
