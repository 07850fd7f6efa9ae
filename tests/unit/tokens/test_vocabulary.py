import pytest
from hypothesis import given
from hypothesis import strategies as st

from mopd.errors import ConfigError
from mopd.tokens.vocabulary import Vocabulary, incomplete_utf8_tail
from tests.helpers.vocabularies import EOS, byte_level, metaspace, spell

BYTE_LEVEL = byte_level(["th", "the", " the", "12"], specials=("<|tool|>",))
METASPACE = metaspace(["th", "the", " the", "ab"])


@pytest.mark.parametrize("vocabulary", [BYTE_LEVEL, METASPACE], ids=["bytes", "metaspace"])
def test_encoding_keeps_the_bytes_and_adds_no_prefix(vocabulary):
    for text in ("the cat", " the", "x", "\u00e9 \U0001f60a!", "12 34", ""):
        ids = vocabulary.encode(text.encode())
        assert vocabulary.decode(ids) == text.encode()
        assert list(vocabulary.byte_ends(ids))[-1:] == ([len(text.encode())] if text else [])
    assert spell(vocabulary, vocabulary.encode(b"the the")) == ["the", " the"]


@given(st.binary(max_size=24))
def test_any_bytes_survive_both_encoders(data):
    for vocabulary in (BYTE_LEVEL, METASPACE):
        assert vocabulary.decode(vocabulary.encode(data)) == data


def test_only_the_end_of_turn_has_no_bytes():
    assert BYTE_LEVEL.token_bytes[BYTE_LEVEL.eos_id] == b""
    tool = BYTE_LEVEL.token_bytes.index(b"<|tool|>")
    assert BYTE_LEVEL.control[tool] and BYTE_LEVEL.lengths[tool] == 8


def test_text_that_spells_a_control_token_does_not_become_one():
    ids = METASPACE.encode(EOS.encode())
    assert METASPACE.eos_id not in ids
    assert METASPACE.decode(ids) == EOS.encode()


def test_by_bytes_prefers_what_the_encoder_emits():
    # the letter a, not its byte token <0x61>
    assert METASPACE.by_bytes[b"a"] == METASPACE.encode(b"a")[0]
    assert METASPACE.by_bytes[b"a"] != 0x61


def test_fingerprints_tell_vocabularies_apart():
    assert byte_level(["ab"]).fingerprint == byte_level(["ab"]).fingerprint
    assert byte_level(["ab"]).fingerprint != byte_level(["ac"]).fingerprint


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (b"abc", 0),
        ("\u00e9".encode()[:1], 1),
        ("\U0001f60a".encode()[:3], 3),
        (b"\xff", 0),
        ("\u00e9".encode(), 0),
        (b"", 0),
        (b"a\x80\x80", 0),
    ],
)
def test_incomplete_utf8_tail(data, size):
    assert incomplete_utf8_tail(data) == size


def test_a_word_level_tokenizer_is_refused():
    spec = {
        "model": {"type": "WordLevel", "vocab": {"a": 0}},
        "pre_tokenizer": None,
        "decoder": None,
    }
    with pytest.raises(ConfigError, match="WordLevel"):
        Vocabulary(spec, eos_id=0)
