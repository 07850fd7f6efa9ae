"""Which rows and tables each loss of a recipe asks for."""

from __future__ import annotations

import numpy as np
import pytest

from mopd.config.schema import RunConfig
from mopd.projection import build_projection
from mopd.runtime.objective import teacher_terms
from mopd.runtime.payloads import pairs, payload_options, projection_options
from tests.helpers.vocabularies import byte_level

STUDENT, TEACHER = byte_level(["ab", "abc"]), byte_level(["bc", "abc"])


def config(**sections: object) -> RunConfig:
    return RunConfig.model_validate({"teachers": {"t": {"model": "x"}}, **sections})


def pair_of(recipe: RunConfig):
    projection = build_projection(STUDENT, TEACHER, projection_options(recipe))
    found = pairs(recipe, {"t": projection}, student=STUDENT, teachers={"t": TEACHER})
    return found["t"]


def options_of(recipe: RunConfig):
    return payload_options(recipe, pair_of(recipe), student=STUDENT, teacher=TEACHER)


def test_ctkd_folds_and_walks() -> None:
    found = options_of(config())
    assert found.folds and found.path is not None
    assert found.interior is None and not found.renormalize


@pytest.mark.parametrize("unreachable", ["rest", "renorm"])
def test_nothing_is_folded_onto_other_columns(unreachable: str) -> None:
    found = options_of(config(ctkd={"unreachable": unreachable}))
    assert found.fold is not None
    elsewhere = found.fold[found.fold != np.arange(TEACHER.size)]
    assert (elsewhere == TEACHER.size).all()
    assert found.renormalize == (unreachable == "renorm")


@pytest.mark.parametrize("key", [{"direction": "pull"}, {"merge": "decayed"}])
def test_a_pull_carries_the_teachers_own_pieces(key: dict[str, str]) -> None:
    found = options_of(config(ctkd={**key, "gamma": 0.3, "path_terms": False}))
    assert found.native_only and found.pieces is not None and found.path is None
    token = STUDENT.by_bytes[b"ab"]
    begin, end = found.pieces.piece_ptr[token : token + 2]
    assert found.pieces.piece[begin:end].tolist() == TEACHER.encode(b"ab")
    assert found.pieces.decay == 0.3


@pytest.mark.parametrize(
    ("loss", "kind"), [("gold", "gold"), ("uld", "uld"), ("kl", "kl"), ("opd", "opd")]
)
def test_other_losses_take_the_bare_lists(loss: str, kind: str) -> None:
    recipe = config(distillation={"loss": loss})
    assert pair_of(recipe).loss == kind
    found = options_of(recipe)
    assert found.fold is None and found.path is None


def test_auto_asks_the_audit() -> None:
    same = RunConfig.model_validate(
        {"teachers": {"t": {"model": "x"}}, "ctkd": {"loss_type": "auto"}}
    )
    projection = build_projection(STUDENT, STUDENT, projection_options(same))
    found = pairs(same, {"t": projection}, student=STUDENT, teachers={"t": STUDENT})
    assert found["t"].loss == "hkl"
    digits = byte_level([f"{n}" for n in range(10, 100)])
    apart = build_projection(digits, TEACHER, projection_options(same))
    assert pairs(same, {"t": apart}, student=digits, teachers={"t": TEACHER})["t"].loss == "ctkd"


def test_hkl_matches_more_than_equal_bytes() -> None:
    import torch

    def matched(threshold: float | None) -> int:
        recipe = config(ctkd={"loss_type": "hkl", "hkl": {"threshold": threshold}})
        terms = teacher_terms(
            recipe,
            {"t": pair_of(recipe)},
            start=0,
            end=STUDENT.size,
            device=torch.device("cpu"),
        )
        projection = terms["t"].projection
        assert projection is not None
        return int((projection.common >= 0).sum())

    exact = matched(None)
    assert exact < TEACHER.size
    assert matched(0.6) >= exact
