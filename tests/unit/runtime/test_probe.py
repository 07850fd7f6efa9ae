"""One short text, scored by the student and by every engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from mopd.demo import World
from mopd.errors import SamplerError
from mopd.runtime.probe import MAX_TOKENS, compare, names_of, probe_ids
from mopd.tokens.chat import ChatTokenizer

OWN = np.linspace(-5.0, -1.0, 20, dtype=np.float32)


def test_the_text_is_short_and_the_same_every_time(tiny_world: World) -> None:
    tokenizer = ChatTokenizer.load(tiny_world.student)
    ids = probe_ids(tokenizer)
    assert 16 < len(ids) <= MAX_TOKENS
    assert ids.tolist() == probe_ids(tokenizer).tolist()


def test_rounding_passes_and_is_measured() -> None:
    noise = np.random.default_rng(0).normal(scale=0.02, size=(2, 20)).astype(np.float32)
    distance = compare(OWN, OWN + noise, tolerance=0.01)
    assert distance == pytest.approx(np.abs(noise.mean(axis=1)).max(), abs=1e-6)
    assert compare(OWN, OWN[None], tolerance=0.0) == 0.0
    assert compare(OWN, None, tolerance=0.01) is None


def test_an_engine_with_other_weights_is_named_with_both_numbers() -> None:
    engines = np.stack([OWN, OWN - 0.5])
    with pytest.raises(
        SamplerError, match=r"engine 1 .* of -3\.50000 and the student -3\.00000; .*probe_tolerance"
    ):
        compare(OWN, engines, tolerance=0.01)
    assert compare(OWN, engines, tolerance=0.6) == pytest.approx(0.5)
    names = ("http://127.0.0.1:8000", "http://127.0.0.1:8001")
    with pytest.raises(SamplerError, match=r"update http://127\.0\.0\.1:8001 gives a fixed text"):
        compare(OWN, engines, tolerance=0.01, names=names)


def test_engines_without_names_have_numbers() -> None:
    assert names_of(object()) == ()
    assert names_of(SimpleNamespace(probed=("a",))) == ("a",)


def test_what_is_no_number_is_no_agreement() -> None:
    with pytest.raises(SamplerError):
        compare(OWN, np.full((1, 20), np.nan, dtype=np.float32), tolerance=1.0)
