"""Every loss option as a whole short run: it starts, its numbers are finite, it matters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from mopd.demo import World
from tests.helpers.dist import run_ranks
from tests.helpers.runs import step_lines, train_here, words

pytestmark = [pytest.mark.dist, pytest.mark.e2e]

NATIVE = {"ctkd__path_terms": "false"}
BOTH = {"teachers__sort__domains": "[]", "teachers__upper__domains": "[]"}
CASES: dict[str, dict[str, Any]] = {
    "hkl": {"ctkd__loss_type": "hkl"},
    "auto": {"ctkd__loss_type": "auto"},
    "exact map": {"ctkd__map": "exact"},
    "pull": {"ctkd__direction": "pull", **NATIVE},
    "decayed": {"ctkd__merge": "decayed", "ctkd__gamma": 0.5, **NATIVE},
    "mean_prob": {"ctkd__merge": "mean_prob", "ctkd__gamma": 0.1},
    "nemo": {"ctkd__merge": "nemo", "ctkd__gamma": 0.1, **NATIVE},
    "observed": {"ctkd__merge": "observed"},
    "bayesian": {"ctkd__merge": "bayesian", "ctkd__lambda_chunk": 1.0},
    "renorm": {"ctkd__unreachable": "renorm"},
    "rest": {"ctkd__unreachable": "rest"},
    "interior": {"ctkd__interior_rows": "true"},
    "whole rows": {"distillation__top_k": "null"},
    "shared columns": {"distillation__top_k": "null", "distillation__shared_columns": 40},
    "tempered whole rows": {"distillation__top_k": "null", "distillation__temperature": 2.0},
    "gold exact": {"distillation__loss": "gold", "gold__top_u": "null"},
    "gold whole": {"distillation__loss": "gold", "distillation__top_k": "null"},
    "gold peers": {"distillation__loss": "gold", "gold__rest_bin": "false"},
    "gold bayesian": {"distillation__loss": "gold", "gold__merge": "bayesian"},
    "uld": {"distillation__loss": "uld", "uld__top_u": "null"},
    "opd": {"distillation__loss": "opd"},
    "opd tempered": {
        "distillation__loss": "opd",
        "rollout__temperature": 0.7,
        "opd__importance": "sequence_mask",
        "opd__discount": 0.5,
    },
    "sft": {"distillation__crossentropy_weight": 0.5},
    "dynamic": {"distillation__crossentropy_weight": 0.5, "distillation__balance": "dynamic"},
    "canonical prefix": {"distillation__positions": "canonical_prefix"},
    "by token": {"distillation__normalization": "token"},
    "by sequence": {"distillation__normalization": "sequence"},
    "nll weights": {"distillation__teacher_weighting": "nll", **BOTH},
    "best teacher": {"distillation__teacher_selection": "best", **BOTH},
    "shared teachers": {"distillation__teacher_selection": "weighted", **BOTH},
    "unfused": {"student__fused_head": "false"},
}
# the same rollouts, the same loss: nothing may change
EQUAL = {"unfused"}
# what they act on may be missing, such as (interior) teacher tokens of several student ones
MAY_BE_EQUAL = {"auto", "canonical prefix", "interior"}


@pytest.fixture(scope="module")
def plain(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tiny_world, tmp_path_factory.mktemp("plain"), {})


@pytest.fixture(scope="module")
def plain_both(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tiny_world, tmp_path_factory.mktemp("both"), BOTH)


def run(world: World, directory: Path, keys: dict[str, Any], *, ranks: int = 1) -> Any:
    settings = {"train__steps": 2, "evaluate__max_prompts_per_domain": 2, **keys}
    run_ranks(
        train_here, ranks, "mopd_ctkd", words(world, directory, "run", **settings), timeout=120
    )
    return step_lines(directory / "run")


@pytest.mark.parametrize("case", CASES)
def test_an_option_trains(
    case: str,
    tiny_world: World,
    tmp_path: Path,
    plain: list[dict[str, Any]],
    plain_both: list[dict[str, Any]],
) -> None:
    keys = CASES[case]
    lines = run(tiny_world, tmp_path, keys)
    for line in lines:
        assert math.isfinite(line["loss"]) and line["grad_norm"] > 0 and not line["skipped"]
    base = plain_both if BOTH.items() <= keys.items() else plain
    first, reference = lines[0]["grad_norm"], base[0]["grad_norm"]
    if case in EQUAL:
        assert first == pytest.approx(reference, rel=1e-5)
    elif case == "dynamic":  # the first step has no averages yet
        assert lines[1]["grad_norm"] != pytest.approx(base[1]["grad_norm"], rel=1e-6)
    elif case not in MAY_BE_EQUAL:
        assert first != pytest.approx(reference, rel=1e-6)


@pytest.mark.parametrize("recipe", ["mopd_kl"])
@pytest.mark.parametrize("support", ["student", "union"])
def test_kl_on_the_students_support(
    recipe: str, support: str, tiny_world: World, tmp_path: Path
) -> None:
    keys = {
        "distillation__top_k": "null",
        "kl__support": support,
        "kl__support_top_k": 8,
        "train__steps": 1,
        "evaluate__max_prompts_per_domain": 2,
        "teachers__sort__model": tiny_world.student,  # a teacher with the student's tokenizer
        "teachers__sort__domains": "[]",
        "teachers__upper": "null",
    }
    run_ranks(train_here, 1, recipe, words(tiny_world, tmp_path, "run", **keys), timeout=120)
    (line,) = step_lines(tmp_path / "run")
    assert line["loss"] == pytest.approx(0.0, abs=1e-5)  # it is the student itself


LEARNED = {
    "ctkd__learned__enabled": "true",
    "ctkd__gamma": 0.1,
    "train__steps": 4,
    "checkpoint__save_interval": 2,
}


def test_a_learned_projection_is_the_same_on_two_ranks_and_after_a_restart(
    tiny_world: World, tmp_path: Path
) -> None:
    one = run(tiny_world, tmp_path / "one", LEARNED)
    replay = {
        "rollout__backend__type": "replay",
        "rollout__backend__path": tmp_path / "one" / "run" / "journal",
    }
    keys = {**LEARNED, **replay, "student__parallel__tensor_model_parallel_size": 2}
    two = run(tiny_world, tmp_path / "two", keys, ranks=2)
    assert [line["loss"] for line in two] == pytest.approx([x["loss"] for x in one], rel=1e-4)
    first = load_file(tmp_path / "one" / "run" / "projections" / "sort.safetensors")
    other = load_file(tmp_path / "two" / "run" / "projections" / "sort.safetensors")
    assert first["steps"][0] == 4
    assert abs(first["log_weight"] - other["log_weight"]).max() < 2e-3
    assert abs(first["first_moment"]).max() > 0

    # from the checkpoint at step 2 the run ends in the same weights, bit for bit
    again = tmp_path / "one" / "run"
    (again / "checkpoints" / "latest").write_text("step-000002")
    summary = json.loads((again / "summary.json").read_text())
    (again / "summary.json").unlink()
    run(tiny_world, tmp_path / "one", LEARNED)
    repeated = load_file(again / "projections" / "sort.safetensors")
    for name, array in first.items():
        assert (repeated[name] == array).all(), name
    assert json.loads((again / "summary.json").read_text())["steps"] == summary["steps"]
