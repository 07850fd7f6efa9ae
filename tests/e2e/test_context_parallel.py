"""Every loss on two context-parallel ranks: the first step is that of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mopd.demo import World
from tests.e2e.test_options import BOTH, run

pytestmark = [pytest.mark.dist, pytest.mark.e2e]

CP2 = {"student__parallel__context_parallel_size": 2}
CASES: dict[str, dict[str, Any]] = {
    "chunk term": {"ctkd__lambda_chunk": 1.0},
    "interior, by merges": {"ctkd__interior_rows": "true", "ctkd__merge": "bayesian"},
    "mean_prob": {"ctkd__merge": "mean_prob", "ctkd__gamma": 0.1},
    "whole rows": {"distillation__top_k": "null", "train__packing": "true"},
    "gold": {"distillation__loss": "gold", "gold__lambda_chunk": 0.5, "train__packing": "true"},
    "opd": {"distillation__loss": "opd", "opd__discount": 0.5},
    "opd by sequence": {
        "distillation__loss": "opd",
        "opd__importance": "sequence_mask",
        "rollout__temperature": 0.7,
    },
    "sft": {"distillation__crossentropy_weight": 0.5, "student__fused_head": "false"},
    "learned": {"ctkd__learned__enabled": "true", "ctkd__gamma": 0.1},
    "shared teachers": {"distillation__teacher_selection": "weighted", **BOTH},
}


@pytest.mark.parametrize("case", CASES)
def test_two_context_ranks_take_the_step_of_one(
    case: str, tiny_world: World, tmp_path: Path
) -> None:
    one = run(tiny_world, tmp_path / "one", CASES[case])
    replay = {
        "rollout__backend__type": "replay",
        "rollout__backend__path": tmp_path / "one" / "run",
    }
    two = run(tiny_world, tmp_path / "two", CASES[case] | CP2 | replay, ranks=2)
    assert one[0].keys() == two[0].keys()
    for key, value in one[0].items():
        if isinstance(value, float):
            assert two[0][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-3)
