"""Teachers that are killed under a run: nothing lost, nothing twice, not a bit different."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mopd.demo import World
from tests.faults import kills
from tests.helpers.dist import run_ranks
from tests.helpers.runs import launch, start, train_here
from tests.helpers.stub_process import StubProcess

pytestmark = [pytest.mark.dist, pytest.mark.e2e]

STEPS = 12


@pytest.fixture(scope="module")
def stubs(tiny_world: World) -> Iterator[list[StubProcess]]:
    """Two servers of one teacher; a test leaves both of them well."""
    with ExitStack() as stack:
        yield [stack.enter_context(kills.stub(tiny_world)) for _ in range(2)]


@pytest.fixture(scope="module")
def clean(
    tiny_world: World, stubs: list[StubProcess], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The undisturbed run."""
    directory = tmp_path_factory.mktemp("kills")
    arguments = kills.run_words(tiny_world, directory, "clean", stubs, train__steps=STEPS)
    run_ranks(train_here, 1, "mopd_ctkd", arguments, timeout=120)
    return directory / "clean"


def test_a_killed_replica_changes_nothing(
    tiny_world: World, stubs: list[StubProcess], clean: Path, tmp_path: Path
) -> None:
    arguments = kills.run_words(tiny_world, tmp_path, "hit", stubs, train__steps=STEPS)
    plan = kills.blows(1, steps=STEPS, number=2)
    ended = kills.disturbed(arguments, tmp_path / "hit", stubs, plan)
    assert (ended.code, ended.errors) == (0, "")
    assert kills.failures(tmp_path / "hit").total() >= len(plan)
    kills.assert_equal_runs(tmp_path / "hit", clean, steps=STEPS)
    assert kills.longest_step(tmp_path / "hit") < kills.STALL_S


def test_a_sole_teacher_may_come_back(
    tiny_world: World, stubs: list[StubProcess], clean: Path, tmp_path: Path
) -> None:
    """The run waits, and goes on as if nothing had happened."""
    sole, away_s = stubs[:1], 2.0
    arguments = kills.run_words(tiny_world, tmp_path, "back", sole, train__steps=STEPS)
    process = start("mopd_ctkd", arguments)
    try:
        assert kills.reached(process, tmp_path / "back", 5)
        sole[0].kill()
        time.sleep(away_s)
        sole[0].start()
        sole[0].wait()
        _, errors = process.communicate(timeout=kills.GIVE_UP_S)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, errors) == (0, "")
    kills.assert_equal_runs(tmp_path / "back", clean, steps=STEPS)
    assert kills.longest_step(tmp_path / "back") > away_s - 1.0


def test_a_sole_teacher_that_stays_away_ends_the_run(
    tiny_world: World, stubs: list[StubProcess], clean: Path, tmp_path: Path
) -> None:
    """Exit 1 with its name; once it is back the last checkpoint goes on, with more patience."""
    sole, run = stubs[:1], tmp_path / "away"
    arguments = kills.run_words(
        tiny_world,
        tmp_path,
        "away",
        sole,
        train__steps=STEPS,
        teachers__sort__backend__max_retries=1,
        teachers__sort__backend__restart_budget_s=0.5,
    )
    process = start("mopd_ctkd", arguments)
    try:
        assert kills.reached(process, run, 6)
        sole[0].kill()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
        sole[0].start()
        sole[0].wait()
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert line.startswith("error: teachers.sort: no replica answered in")
    assert "restart_budget_s" in line
    assert (run / "checkpoints" / "latest").exists() and len(kills.lines(run)) < STEPS
    patient = [*arguments, "teachers.sort.backend.restart_budget_s=60"]
    again = launch("mopd_ctkd", patient)
    assert again.returncode == 0, again.stderr
    assert "continuing from step" in again.stdout
    kills.assert_equal_runs(run, clean, steps=STEPS)
