"""The first step of a training does not depend on how its answers are cut (oracle 17)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mopd.demo import World
from tests.helpers.dist import run_ranks
from tests.helpers.runs import step_lines, train_here, words

BOTH = {"teachers__sort__domains": "[]", "teachers__upper__domains": "[]"}
CASES: dict[str, dict[str, Any]] = {
    "ctkd": {},
    "chunk term": {"ctkd__lambda_chunk": 1.0, "distillation__normalization": "token"},
    "gold": {"distillation__loss": "gold", "distillation__normalization": "sequence"},
    "opd": {"distillation__loss": "opd", "opd__discount": 0.5},
    "cross entropy": {"distillation__crossentropy_weight": 0.5},
    "two teachers": {"distillation__teacher_selection": "weighted", **BOTH},
}
METRICS = ("loss", "grad_norm", "loss/sort", "loss/upper", "kl/sort", "kl/upper")


def first_step(world: World, directory: Path, name: str, ranks: int, keys: dict[str, Any]) -> Any:
    overrides = words(world, directory, name, train__steps=1, **keys)
    run_ranks(train_here, ranks, "mopd_ctkd", overrides, timeout=120)
    return step_lines(directory / name)[0]


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_the_first_step_17(case: str, tiny_world: World, tmp_path: Path) -> None:
    """Eight answers of unequal length at once, in fours, twos and ones, and over two replicas."""
    keys = CASES[case]
    whole = first_step(tiny_world, tmp_path, "whole", 1, keys | {"train__micro_batch_size": 8})
    assert whole["grad_norm"] > 0.0
    replay = {"rollout__backend__type": "replay", "rollout__backend__path": tmp_path / "whole"}
    for ranks, size in ((1, 4), (1, 2), (1, 1), (2, 4), (2, 1)):
        cut = keys | replay | {"train__micro_batch_size": size}
        found = first_step(tiny_world, tmp_path, f"{ranks}x{size}", ranks, cut)
        for key in METRICS:
            assert found[key] == pytest.approx(whole[key], rel=1e-4), (ranks, size, key)
