"""One-to-one partners: exact pairs first, then the largest weight, then the lowest id."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mopd.projection import ProjectionOptions, build_projection, relaxed_common
from tests.helpers.vocabularies import byte_level, control_of, ids_of

SHARP = ProjectionOptions(max_length=4, gamma=0.0)
SMEARED = ProjectionOptions(max_length=4, gamma=0.1)


def test_partners_by_weight_43() -> None:
    student, teacher = byte_level(["201", "aa", "ab"]), byte_level(["xy"])
    built = build_projection(student, teacher, SMEARED)
    two, token, shorter, aa, ab = ids_of(student, "2", "201", "20", "aa", "ab")
    column, shared = ids_of(teacher, "2", "xy")
    col, val, fold = built.col.copy(), built.val.copy(), built.fold.copy()
    for same in (ab, aa):  # two student tokens that ask for one teacher token
        col[built.crow[same]], val[built.crow[same]] = shared, 1.0
    fold[shared] = shared
    given = dataclasses.replace(built, col=col, val=val, fold=fold)
    strict, relaxed = relaxed_common(given, threshold=1.0), relaxed_common(given)
    assert strict[shared] == relaxed[shared] == min(aa, ab)
    assert strict[column] == two
    assert relaxed[column] == two  # 201 -> 2 with 0.9 loses against 2 -> 2 with 1
    assert token not in relaxed
    # without an exact token the heaviest wins (20: 0.909, 201: 0.901), in the relaxed map only
    val[built.crow[two]] = 0.5
    given = dataclasses.replace(given, val=val)
    assert relaxed_common(given, threshold=1.0)[column] == -1
    assert relaxed_common(given)[column] == shorter


@pytest.mark.parametrize("options", [SHARP, SMEARED])
def test_a_piece_goes_to_a_token_that_begins_with_it(options: ProjectionOptions) -> None:
    # no student token is " vi": it is folded onto " ", which has an exact token, and yet paired
    student = byte_level(["vi", "vix", "vibi", " vibi", " vix"], specials=("<|t|>",))
    teacher = byte_level([" vi", "bi"])
    projection = build_projection(student, teacher, options)
    (space, column) = ids_of(teacher, " ", " vi")
    assert projection.fold[column] == space
    relaxed = relaxed_common(projection)
    assert relaxed[space] == ids_of(student, " ")[0]
    assert relaxed[column] == min(ids_of(student, " vibi", " vix"))
    found = projection.common >= 0
    assert (relaxed[found] == projection.common[found]).all()
    assert control_of(student, "<|t|>") not in relaxed  # null has no partner
    partners = relaxed[relaxed >= 0]
    assert len(np.unique(partners)) == len(partners)
    assert relaxed.dtype == np.int32


def test_weight_1_of_every_token_does_not_evict_the_exact_one() -> None:
    teacher = byte_level([])
    orders = [byte_level(["13"], shuffle=seed) for seed in range(8)]
    assert {ids[0] < ids[1] for ids in (ids_of(v, "13", "1") for v in orders)} == {True, False}
    for student in orders:  # "13" weighs 1 on "1" as well, and has the lower id in some
        relaxed = relaxed_common(build_projection(student, teacher, SHARP))
        assert relaxed[ids_of(teacher, "1")[0]] == ids_of(student, "1")[0]


def test_the_threshold_counts() -> None:
    student, teacher = byte_level(["vi", "vix", " vix"]), byte_level([" vi"])
    options = ProjectionOptions(max_length=4, gamma=1.0)
    projection = build_projection(student, teacher, options)
    (column,) = ids_of(teacher, " vi")
    assert relaxed_common(projection)[column] == -1  # " vi" and "x" weigh 0.5 each
    assert relaxed_common(projection, threshold=0.4)[column] == ids_of(student, " vix")[0]


def test_the_same_tokenizer_pairs_everything_34() -> None:
    vocabulary = byte_level(["the", "12"])
    projection = build_projection(vocabulary, vocabulary, SHARP)
    assert (relaxed_common(projection) == np.arange(vocabulary.size)).all()
