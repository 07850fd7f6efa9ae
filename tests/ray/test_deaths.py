"""SIGKILL of a teacher's actor, the sampler's and a rank in one run: it ends as if undisturbed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from mopd.demo import World
from tests.helpers.ray_runs import none_left, processes, wait_for_step, words
from tests.helpers.runs import launch, step_lines, summary
from tests.helpers.started import running

pytestmark = [pytest.mark.ray, pytest.mark.e2e]

STEPS, INTERVAL = 16, 4  # the last ones are for a pause of this test before it kills
# After so many steps. Before the first one, an actor that loads its model.
VICTIMS = {0: "teachers.upper", 2: "teachers.sort", 5: "rollout", 9: "rank 1"}


def _words(world: World, directory: Path, name: str, address: str) -> list[str]:
    return words(
        world,
        directory,
        name,
        address=address,
        train__steps=STEPS,
        checkpoint__save_interval=INTERVAL,
        rollout__pool="rollout",
        evaluate__teachers="false",
    )


def _kill(run: Path, victim: str) -> set[int]:
    """All processes of the run as they were before."""
    deadline = time.monotonic() + 120.0
    while True:
        found = processes(run)
        pids = [pid for name, pid in found.items() if name.startswith(victim)]
        if pids:
            break
        assert time.monotonic() < deadline, f"{victim} does not start"
        time.sleep(0.02)
    os.kill(pids[0], signal.SIGKILL)
    return set(found.values())


def _counted(run: Path) -> list[dict[str, object]]:
    """Step lines without the requests that failed and were tried again."""
    return [
        {key: value for key, value in line.items() if not key.startswith("requests/")}
        for line in step_lines(run)
    ]


@pytest.mark.timeout(600)
def test_a_run_survives_every_kind_of_actor(
    tiny_world: World, ray_address: str, tmp_path: Path
) -> None:
    clean = launch("mopd_ctkd", _words(tiny_world, tmp_path, "clean", ray_address))
    assert clean.returncode == 0, clean.stderr
    run = tmp_path / "killed"
    met: set[int] = set()
    with running("mopd_ctkd", _words(tiny_world, tmp_path, "killed", ray_address)) as process:
        for step, victim in VICTIMS.items():
            wait_for_step(run, step, process, seconds=120)
            met |= _kill(run, victim)
        _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    met |= set(processes(run).values())
    assert len(met) >= 5 + 2 + 3  # everybody twice
    assert _counted(run) == _counted(tmp_path / "clean")
    assert summary(run)["answers"] == summary(tmp_path / "clean")["answers"]
    assert summary(run)["domains"] == summary(tmp_path / "clean")["domains"]
    assert none_left(sorted(met))


@pytest.mark.timeout(300)
def test_sigterm_saves_and_the_same_command_continues(
    tiny_world: World, ray_address: str, tmp_path: Path
) -> None:
    overrides = words(
        tiny_world,
        tmp_path,
        "stopped",
        address=ray_address,
        train__steps=40,
        checkpoint__save_interval=100,
    )
    with running("mopd_ctkd", overrides) as process:
        wait_for_step(tmp_path / "stopped", 2, process, seconds=120)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert process.returncode == 143
    assert list((tmp_path / "stopped" / "checkpoints").glob("step-*"))


@pytest.mark.timeout(300)
def test_a_mistake_is_told_and_not_tried_again(
    tiny_world: World, ray_address: str, tmp_path: Path
) -> None:
    overrides = words(
        tiny_world,
        tmp_path,
        "mistaken",
        address=ray_address,
        distillation__loss="opd",
        teachers__sort__backend__type="custom",
        teachers__sort__backend__target="tests.helpers.mistaken:Mistaken",
        evaluate__teachers="false",
    )
    done = launch("mopd_ctkd", overrides)
    assert done.returncode == 1, done.stderr
    assert "LookupError: a mistake of this teacher's own" in done.stderr
    assert "start again" not in done.stdout
    assert none_left(list(processes(tmp_path / "mistaken").values()))
