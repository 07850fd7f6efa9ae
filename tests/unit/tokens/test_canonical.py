"""What may follow a canonical text, against the definition, on whole texts."""

from __future__ import annotations

import numpy as np
import pytest

from mopd.demo import World
from mopd.tokens import canonical
from mopd.tokens.canonical import CanonicalNext
from mopd.tokens.chat import ChatTokenizer
from mopd.tokens.vocabulary import Vocabulary
from tests.helpers.vocabularies import byte_level, metaspace


def allowed(vocabulary: Vocabulary, ids: list[int]) -> np.ndarray:
    """The definition, without tails."""
    text = vocabulary.decode(ids)
    pieces = vocabulary.token_bytes
    found = [vocabulary.encode(text + pieces[v]) == [*ids, v] for v in range(vocabulary.size)]
    found[vocabulary.eos_id] = True
    return np.array(found)


@pytest.mark.parametrize(
    ("vocabulary", "texts"),
    [
        (byte_level(["ab", "bc", "abcd"]), ["", "a", "ab", "abab", "xabc"]),
        (metaspace(["ab", " ab", "bc"]), ["", "ab", "ab ab", "b c"]),
    ],
    ids=["byte level", "metaspace"],
)
def test_small_vocabularies(vocabulary: Vocabulary, texts: list[str]) -> None:
    following = CanonicalNext(vocabulary)
    for text in texts:
        ids = vocabulary.encode(text.encode())
        mask = following.allowed(ids)
        assert mask.tolist() == allowed(vocabulary, ids).tolist(), text
        assert mask.sum() > 1 and not (text and mask.all())


@pytest.mark.parametrize("text", ["", "1379", "GAPI DE", "GAPI ", "it's 'l", "a  b", "!?", "é"])
def test_pre_tokens_cut_the_text_where_it_makes_no_difference(text: str, tiny_world: World) -> None:
    vocabulary = ChatTokenizer.load(tiny_world.student).vocabulary
    ids = vocabulary.encode(text.encode())
    assert CanonicalNext(vocabulary).allowed(ids).tolist() == allowed(vocabulary, ids).tolist()


def test_a_text_that_is_not_canonical_is_not_restricted() -> None:
    vocabulary = byte_level(["ab"])
    ids = [vocabulary.by_bytes[b"a"], vocabulary.by_bytes[b"b"]]
    assert CanonicalNext(vocabulary).allowed(ids).all()


def test_other_tokens_that_end_an_answer_may_always_follow() -> None:
    """Their own text is spelled with other tokens, so no segmentation has them."""
    vocabulary = byte_level(["ab"])
    stop = vocabulary.by_bytes[b"b"]  # behind `a` it would make `ab`
    ids = vocabulary.encode(b"a")
    assert not CanonicalNext(vocabulary).allowed(ids)[stop]
    found = CanonicalNext(vocabulary, stop_ids=(stop,)).allowed(ids)
    assert found[stop] and found[vocabulary.eos_id]
    assert found.sum() == CanonicalNext(vocabulary).allowed(ids).sum() + 1


def test_what_is_remembered_has_a_bound_and_texts_that_ended_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vocabulary = byte_level(["ab"])
    following = CanonicalNext(vocabulary)
    monkeypatch.setattr(canonical, "MAX_REMEMBERED_BYTES", 3 * vocabulary.size)
    for letter in b"cdefgh":
        following.allowed([vocabulary.by_bytes[bytes([letter])]])
        assert following.remembered_bytes <= 3 * vocabulary.size
    assert following.remembered_bytes > 0
    before = following.remembered_bytes
    for padding in range(1, 50):  # what a batch feeds to rows that have ended
        following.allowed([*vocabulary.encode(b"ab"), *[vocabulary.eos_id] * padding])
    assert following.remembered_bytes == before
