"""The same run under torchrun and as actors: dedicated pools, one shared pool, a sampler apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mopd.demo import World
from tests.helpers.dist import run_ranks
from tests.helpers.ray_runs import TP2, none_left, processes, words
from tests.helpers.runs import launch, step_lines, summary, train_here
from tests.helpers.runs import words as plain_words

pytestmark = [pytest.mark.ray, pytest.mark.e2e]

SHARED = {
    "teachers__sort__pool": "judges",
    "teachers__upper__pool": "judges",
    "pools__judges__shared": "true",
}
LOSSES = ("loss", "loss/sort", "loss/upper", "kl/sort", "kl/upper", "grad_norm")


@pytest.fixture(scope="module")
def torchrun(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, teachers and sampler in the lead's process."""
    directory = tmp_path_factory.mktemp("runs")
    overrides = plain_words(tiny_world, directory, "torchrun", **TP2)
    run_ranks(train_here, 2, "mopd_ctkd", overrides, timeout=120)
    return directory / "torchrun"


def _first_answers(run: Path) -> list[list[int]]:
    lines = (run / "journal" / "rollouts-0.jsonl").read_text().splitlines()
    return [line["ids"] for line in map(json.loads, lines) if line["step"] == 0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("pools", ["dedicated", "shared"])
def test_actors_train_as_torchrun_does(
    pools: str, torchrun: Path, tiny_world: World, ray_address: str
) -> None:
    changes: dict[str, Any] = SHARED if pools == "shared" else {}
    done = launch(
        "mopd_ctkd",
        words(tiny_world, torchrun.parent, pools, address=ray_address, **changes),
    )
    assert done.returncode == 0, done.stderr
    run = torchrun.parent / pools
    assert _first_answers(run) == _first_answers(torchrun) != []
    here, there = step_lines(run), step_lines(torchrun)
    assert len(here) == len(there)
    for key in LOSSES:
        assert here[0][key] == pytest.approx(there[0][key], rel=1e-4), key
    assert summary(run)["domains"].keys() == summary(torchrun)["domains"].keys()
    for name, found in summary(torchrun)["domains"].items():
        assert summary(run)["domains"][name]["teacher"] == found["teacher"]
    actors = processes(run)
    hosts = (
        ["teachers.sort, teachers.upper"]
        if pools == "shared"
        else ["teachers.sort", "teachers.upper"]
    )
    assert sorted(name.rpartition(" ")[0] for name in actors) == sorted(["rank", "rank", *hosts])
    assert none_left(list(actors.values()))


@pytest.mark.timeout(300)
def test_a_sampler_in_a_pool_of_its_own_has_the_weights_of_every_step(
    tiny_world: World, ray_address: str, tmp_path: Path
) -> None:
    done = launch(
        "mopd_ctkd",
        words(tiny_world, tmp_path, "apart", address=ray_address, rollout__pool="rollout"),
    )
    assert done.returncode == 0, done.stderr
    assert any(name.startswith("rollout") for name in processes(tmp_path / "apart"))
    lines = step_lines(tmp_path / "apart")
    # the probe compares the sampler's log-probabilities with the student's after every push
    assert all(abs(line["sync/probe"]) < 1e-3 for line in lines if "sync/probe" in line)


def test_a_second_launch_of_a_finished_run_says_so(
    torchrun: Path, tiny_world: World, ray_address: str
) -> None:
    """It is the same run, whoever launched it."""
    overrides = words(tiny_world, torchrun.parent, "torchrun", address=ray_address)
    done = launch("mopd_ctkd", overrides)
    assert done.returncode == 0, done.stderr
    assert "is finished" in done.stdout
