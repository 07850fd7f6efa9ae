"""40 steps on two ranks of each axis learn what one process learns.

Off-policy, with large steps: on-policy, 40 steps of the embedded world show nothing yet.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from mopd.demo import World
from tests.helpers.dist import run_ranks
from tests.helpers.runs import summary, train_here, words
from tests.helpers.upcycle import upcycle

STEPS = int(os.environ.get("SOAK_AXIS_STEPS", "40"))
PARALLEL = "student__parallel__"
AXES: dict[str, dict[str, Any]] = {
    "tp2": {f"{PARALLEL}tensor_model_parallel_size": 2, f"{PARALLEL}sequence_parallel": "true"},
    "pp2": {f"{PARALLEL}pipeline_model_parallel_size": 2},
    "cp2": {f"{PARALLEL}context_parallel_size": 2, "train__packing": "true"},
    "ep2": {f"{PARALLEL}expert_model_parallel_size": 2},
}
HELDOUT = 512  # prompts of a domain


@pytest.fixture(scope="module")
def experts(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's student as a mixture of four experts."""
    return upcycle(world.student, tmp_path_factory.mktemp("experts") / "student")


def accuracy(world: World, folder: Path, name: str, ranks: int, keys: dict[str, Any]) -> Any:
    """Held-out accuracy before and after, and the headroom that was recovered."""
    settings = {
        "train__steps": STEPS,
        "train__num_prompts_per_step": 256,
        "train__micro_batch_size": 64,
        "student__optimizer__lr": 4e-3,
        "student__optimizer__lr_warmup_fraction": 0.1,
        "student__optimizer__lr_decay_fraction": 0.4,
        "evaluate__teachers": "true",
        "checkpoint__save_interval": STEPS,
        "evaluate__max_prompts_per_domain": HELDOUT,
        **keys,
    }
    overrides = words(world, folder, name, **settings)
    run_ranks(train_here, ranks, "mopd_offpolicy", overrides, timeout=600)
    return summary(folder / name)["domains"]


@pytest.fixture(scope="module")
def one_process(
    world: World, experts: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Of the dense student and of the experts."""
    folder = tmp_path_factory.mktemp("one")
    models = {"dense": world.student, "experts": experts}
    return {
        name: accuracy(world, folder, name, 1, {"student__model": model})
        for name, model in models.items()
    }


@pytest.mark.parametrize("axis", AXES)
def test_an_axis_reaches_the_headroom_of_one_process(
    axis: str, world: World, experts: Path, one_process: dict[str, Any], tmp_path: Path
) -> None:
    kind, model = ("experts", experts) if axis == "ep2" else ("dense", world.student)
    found = accuracy(world, tmp_path, axis, 2, {"student__model": model, **AXES[axis]})
    expected = one_process[kind]
    print(json.dumps({"axis": axis, "steps": STEPS, "one process": expected, "two ranks": found}))
    for domain, one in expected.items():
        two = found[domain]
        assert two["before"] == pytest.approx(one["before"], abs=0.01)
        assert one["headroom_recovered"] > 0.5  # there is something to compare
        # two runs that draw apart by rounding: three standard errors of their difference
        noise = 3 * math.sqrt(2 * max(one["after"] * (1 - one["after"]), 0.01) / HELDOUT)
        assert abs(two["after"] - one["after"]) < noise
