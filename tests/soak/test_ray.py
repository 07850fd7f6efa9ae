"""The embedded world, whole, under torchrun and in Ray mode: the same headroom is recovered.

Two ranks each; in Ray mode the teachers are actors, in pools of their own and in one that they
share.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mopd.demo import World
from mopd.runtime.ray.head import LocalHead
from tests.helpers.dist import run_ranks
from tests.helpers.ray_runs import TP2
from tests.helpers.runs import ROOT, launch, step_lines, summary, train_here

pytestmark = pytest.mark.ray

STEPS = int(os.environ.get("SOAK_RAY_STEPS", "500"))
RUN_S = 3600.0
CLOSE = 0.03  # of the headroom
POOLS = {
    "dedicated": {},
    "shared": {
        "teachers__sort__pool": "judges",
        "teachers__upper__pool": "judges",
        "pools__judges__shared": "true",
    },
}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    head = LocalHead(num_cpus=4)
    try:
        head.wait()
        yield head.address
    finally:
        head.close()


def whole_world() -> dict[str, Any]:
    """Of recipes/world.yaml, with `__` for the dots."""
    given = OmegaConf.to_container(OmegaConf.load(ROOT / "recipes" / "world.yaml"))
    found: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        if not isinstance(node, dict):
            found[path] = node
            return
        for name, value in node.items():
            walk(value, f"{path}__{name}" if path else str(name))

    walk(given, "")
    return found


def words(world: World, directory: Path, name: str, **more: Any) -> list[str]:
    """As `make train`, whose settings are those of recipes/world.yaml, on two ranks."""
    settings: dict[str, Any] = {
        **whole_world(),
        "run__dir": directory,
        "run__name": name,
        "run__threads": 1,
        "cache_dir": directory / "cache",
        "student__model": world.student,
        "data__path": world.data,
        "data__heldout_path": world.heldout,
        "train__steps": STEPS,
        **TP2,
        **more,
    }
    for teacher, path in world.teachers.items():
        settings[f"teachers__{teacher}__model"] = path
        settings[f"teachers__{teacher}__domains"] = f"[{teacher}]"
    return [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]


def recovered(run: Path) -> dict[str, float]:
    """By domain."""
    domains = summary(run)["domains"]
    return {name: found["headroom_recovered"] for name, found in domains.items()}


@pytest.fixture(scope="module")
def torchrun(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("soak")
    run_ranks(train_here, 2, "mopd_ctkd", words(world, directory, "torchrun"), timeout=RUN_S)
    return directory / "torchrun"


@pytest.mark.parametrize("pools", POOLS)
def test_actors_recover_what_torchrun_does(
    pools: str, world: World, torchrun: Path, address: str
) -> None:
    directory = torchrun.parent
    given = words(world, directory, pools, launcher="ray", ray__address=address, **POOLS[pools])
    done = launch("mopd_ctkd", given, timeout=RUN_S)
    assert done.returncode == 0, done.stderr
    here, there = directory / pools, torchrun
    found, expected = recovered(here), recovered(there)
    first = [step_lines(run)[0]["loss"] for run in (here, there)]
    print(
        json.dumps(
            {
                "steps": STEPS,
                "pools": pools,
                "recovered": found,
                "under torchrun": expected,
                "loss of step 0": first,
            }
        )
    )
    assert first[0] == pytest.approx(first[1], rel=1e-4)
    assert found.keys() == expected.keys() != set()
    for domain, one in expected.items():
        if STEPS >= 500:
            assert one > 0.5  # there is something to compare
        assert abs(found[domain] - one) < CLOSE, domain
