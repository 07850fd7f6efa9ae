"""A tokenizer with one thing changed cuts the probe's texts into other tokens."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer

from mopd.demo.spec import WorldSpec
from mopd.demo.tokenizers import make_tokenizer
from mopd.tokens.probe import probe_texts
from tests.unit.tokens import trained

NAMES = ("student", "sort", "upper")
Spec = dict[str, Any]


@pytest.fixture(scope="module", params=NAMES)
def spec(request: pytest.FixtureRequest) -> Spec:
    return spec_of(request.param)


def spec_of(name: str) -> Spec:
    tokenizer = make_tokenizer(WorldSpec.tiny(), name=name)
    return json.loads(tokenizer.backend_tokenizer.to_str())


def ids(spec: Spec, texts: list[str]) -> list[list[int]]:
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def changed(spec: Spec, change: Callable[[Spec], object]) -> Spec:
    other = copy.deepcopy(spec)
    change(other)
    return other


def test_any_merge_that_is_left_out_shows(spec: Spec) -> None:
    texts = probe_texts(spec)
    own = ids(spec, texts)
    count = len(spec["model"]["merges"])
    assert count > 100
    for rank in range(0, count, 5):
        other = changed(spec, lambda s, rank=rank: s["model"]["merges"].pop(rank))
        assert ids(other, texts) != own, spec["model"]["merges"][rank]


def test_rivals_that_change_places_show() -> None:
    """Two merges that want the same piece; what each of them makes alone stays as it was."""
    spec = spec_of("sort")
    texts = probe_texts(spec)
    own = ids(spec, texts)
    merges = spec["model"]["merges"]
    pairs = [
        (i, j)
        for i in range(len(merges))
        for j in range(i + 1, len(merges))
        if merges[i][1] == merges[j][0] and len("".join(merges[i] + merges[j])) < 6
    ]
    assert len(pairs) > 10

    def swap(s: Spec, i: int, j: int) -> None:
        table = s["model"]["merges"]
        table[i], table[j] = table[j], table[i]

    for i, j in pairs[:: len(pairs) // 10]:
        other = changed(spec, lambda s, i=i, j=j: swap(s, i, j))
        text = "".join(merges[i]) + merges[j][1]
        if ids(other, [text]) != ids(spec, [text]):
            assert ids(other, texts) != own, (merges[i], merges[j])


def test_any_added_token_that_is_missing_or_another_shows(spec: Spec) -> None:
    texts = probe_texts(spec)
    own = ids(spec, texts)
    for place, token in enumerate(spec["added_tokens"]):
        missing = changed(spec, lambda s, place=place: s["added_tokens"].pop(place))
        vocab = missing["model"]["vocab"]
        vocab["\u0000"] = vocab.pop(token["content"])
        assert ids(missing, texts) != own, token["content"]
        other = changed(spec, lambda s, place=place: s["added_tokens"][place].update(content="<y>"))
        other["model"]["vocab"]["<y>"] = other["model"]["vocab"].pop(token["content"])
        if "unk_token" in spec["model"] and token["content"] == spec["model"]["unk_token"]:
            other["model"]["unk_token"] = "<y>"
        assert ids(other, texts) != own, token["content"]


@pytest.mark.parametrize("kind", trained.KINDS)
def test_another_normalizer_shows(kind: str) -> None:
    spec = json.loads(trained.vocabulary(kind)._encoder.to_str())
    texts = probe_texts(spec)
    added = {"type": "Replace", "pattern": {"String": "e"}, "content": "a"}
    every = [part for part in (spec["normalizer"], added) if part]
    other = spec | {"normalizer": {"type": "Sequence", "normalizers": every}}
    assert ids(other, texts) != ids(spec, texts)


def test_a_normalizer_that_changes_no_piece_shows() -> None:
    """Only running text has what it joins."""
    spec = spec_of("student")
    texts = probe_texts(spec)
    assert ids(spec | {"normalizer": {"type": "NFC"}}, texts) != ids(spec, texts)


def test_another_pre_tokenizer_shows() -> None:
    """Numbers in groups of one digit instead of two."""
    spec = spec_of("student")
    texts = probe_texts(spec)
    first = spec["pre_tokenizer"]["pretokenizers"][0]
    assert first["pattern"]["Regex"].startswith("\\p{N}{1,2}")

    def change(s: Spec) -> None:
        pattern = s["pre_tokenizer"]["pretokenizers"][0]["pattern"]
        pattern["Regex"] = pattern["Regex"].replace("{1,2}", "")

    assert ids(changed(spec, change), texts) != ids(spec, texts)


def test_a_large_vocabulary_is_sampled_and_its_added_tokens_never(spec: Spec) -> None:
    whole = probe_texts(spec)
    texts = probe_texts(spec, max_bytes=3_000, piece_bytes=500)
    assert len(whole) == 1 and len(texts) > 1
    assert sum(len(text.encode()) for text in texts) < 4_500
    assert max(len(text.encode()) for text in texts) < 700
    assert texts == probe_texts(copy.deepcopy(spec), max_bytes=3_000, piece_bytes=500)
    separated = "".join(texts)
    assert all(token["content"] in separated for token in spec["added_tokens"])
    own = ids(spec, texts)
    for rank in (-1, -2, -3):
        assert ids(changed(spec, lambda s, r=rank: s["model"]["merges"].pop(r)), texts) != own
