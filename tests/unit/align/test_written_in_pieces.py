"""The teacher that is the student written in pieces must ask for nothing."""

import pytest

from tests.helpers.pieces import boundaries

VOCABULARIES = {
    "digits": (["13"], [], "123"),
    "two levels": (["12", "123"], [], "123"),
    "two levels and a gap": (["123"], [], "123"),
    "class share": (["vi", "vibi", " vibi"], [" vi", "bi"], "vib "),
    "teacher has longer tokens": ([], ["ab"], "abc"),
    "teacher has tokens behind the student's": (["ab"], ["abc"], "abc"),
    "n-m": (["ab", "abc"], ["bc"], "abc"),
    "two fibres in one column": (["vi", "vibi", " vibi", " x"], [" vi", "bi"], "vibx "),
    "a gap off the path": (["23", "123"], [], "123"),  # no "12" to stop at
}
SEEDS = range(3)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", VOCABULARIES)
def test_nothing_is_asked_where_both_have_read_the_same(name: str, seed: int) -> None:
    found = boundaries(*VOCABULARIES[name], seed=seed)
    asked = [b for b in found if b.same_past and (b.gradient > 1e-6 or abs(b.value) > 1e-6)]
    assert not asked, asked[:3]
    assert any(b.same_past and not b.first for b in found)


def test_segmentation_bias_is_all_that_is_left() -> None:
    """After the student's "1" the teacher still expects the 3 of "13": a bias it cannot avoid."""
    found = boundaries(*VOCABULARIES["digits"], seed=0)
    assert any(b.gradient > 1e-2 for b in found if not b.same_past)
    assert all(b.same_past for b in found if b.first)


@pytest.mark.parametrize(
    ("name", "vocabularies"),
    [
        ("folds behind another stop token", (["13"], ["3x", "13x"], "13x")),
        ("student merges not from the left", (["bc", "ab"], [], "abc")),
        ("teacher merges across student tokens", (["abcd", "abcc"], ["ab", "cd"], "abcd")),
    ],
)
def test_known_cases_that_ask_for_something(name: str, vocabularies: tuple) -> None:
    """Path terms are exact only where both sides merge from the left and folds end in one token.

    The first boundary has the same past by definition, yet it has a gradient here.
    """
    found = boundaries(*vocabularies, seed=0)
    assert all(b.same_past for b in found if b.first), name
    assert max(b.gradient for b in found if b.first) > 1e-4, name
