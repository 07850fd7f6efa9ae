"""A sampling server of its own process, killed under a run: the run waits, and nothing differs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mopd.demo import World
from tests.faults import kills
from tests.helpers.dist import run_ranks
from tests.helpers.hf_host import ServeProcess
from tests.helpers.runs import start, step_lines, train_here, words

pytestmark = [pytest.mark.dist, pytest.mark.e2e]

STEPS = 12  # a kill after two of them, however late, comes before the last is sampled


@pytest.fixture(scope="module")
def served(tiny_world: World) -> Iterator[ServeProcess]:
    with ServeProcess(tiny_world.student, "--sample") as served:
        yield served


def run_words(world: World, directory: Path, served: ServeProcess, **backend: Any) -> list[str]:
    backend = {"type": "vllm", "urls": f"[{served.url}]", **backend}
    settings = {f"rollout__backend__{key}": value for key, value in backend.items()}
    few = {"train__steps": STEPS, "checkpoint__save_interval": STEPS}
    return words(world, directory, "run", **few, **settings)


@pytest.fixture(scope="module")
def clean(
    tiny_world: World, served: ServeProcess, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The undisturbed run."""
    directory = tmp_path_factory.mktemp("clean")
    arguments = run_words(tiny_world, directory, served)
    run_ranks(train_here, 1, "mopd_ctkd", arguments, timeout=240)
    return directory / "run"


def versions(run: Path) -> list[tuple[int, int]]:
    """(step, policy version) of every answer."""
    text = (run / "journal" / "rollouts-0.jsonl").read_text()
    return [(record["step"], record["version"]) for record in map(json.loads, text.splitlines())]


@pytest.mark.parametrize("mode", ["files", "broadcast"])
def test_a_server_that_is_killed_and_started_again_changes_nothing(
    tiny_world: World, served: ServeProcess, clean: Path, tmp_path: Path, mode: str
) -> None:
    hit = tmp_path / "run"
    process = start("mopd_ctkd", run_words(tiny_world, tmp_path, served, weight_sync=mode))
    try:
        assert kills.reached(process, hit, 2)
        served.kill()  # its weights are gone with it
        served.start()
        _, errors = process.communicate(timeout=kills.GIVE_UP_S)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert kills.failures(hit).total() >= 1
    assert kills.failures(clean).total() == 0
    assert versions(hit) == [(step, step) for step in range(STEPS) for _ in range(8)]
    kills.assert_equal_runs(hit, clean, steps=STEPS)
    assert all(line["sync/probe"] < 1e-3 for line in step_lines(hit))
