"""A save that fails in the middle of a run: one line, exit 1, and the next launch goes on."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mopd import fault_points
from mopd.demo import World
from mopd.student.checkpoint import find_latest, verify
from tests.faults import kills
from tests.helpers.forked import Trainer, run_trainers
from tests.helpers.runs import words

pytestmark = [pytest.mark.dist, pytest.mark.e2e]

STEPS, INTERVAL = 6, 2


def at_second(point: str, action: Callable[[], None]) -> None:
    """``action`` when ``point`` comes by for the second time: of the save after the first."""
    passed: list[str] = []

    def handle(name: str) -> None:
        if name == point:
            passed.append(name)
            if len(passed) == 2:
                action()

    fault_points.install(handle)


def fail(number: int) -> None:
    raise OSError(number, os.strerror(number), "a file")


def limit(what: int, value: int) -> None:
    """A real limit of this process, from here on."""
    resource.setrlimit(what, (value, resource.getrlimit(what)[1]))


def no_more_files() -> None:
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    for _ in range(highest):  # the free numbers below
        if os.open("/dev/null", os.O_RDONLY) > highest:
            break
    limit(resource.RLIMIT_NOFILE, highest + 2)


CASES: dict[str, tuple[str, Callable[[], None], str]] = {
    "full": ("save.shard.started", partial(fail, errno.ENOSPC), "free some space"),
    "read-only": ("save.part.created", partial(fail, errno.EROFS), "make it writable"),
    "files too large": (
        "save.part.created",
        partial(limit, resource.RLIMIT_FSIZE, 100_000),
        "raise the limit on the size of a file",
    ),
    "no more files": ("save.part.created", no_more_files, "raise the limit on open files"),
}


@pytest.fixture(scope="module")
def clean(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("disk")
    trainer = Trainer(overrides=run_words(tiny_world, directory, "clean"), run=directory / "clean")
    (ended,) = run_trainers([trainer])
    assert ended.code == 0, ended.errors
    return directory / "clean"


def run_words(world: World, directory: Path, name: str, *, is_async: bool = False) -> list[str]:
    return words(
        world,
        directory,
        name,
        train__steps=STEPS,
        checkpoint__save_interval=INTERVAL,
        checkpoint__async_save=str(is_async).lower(),
        evaluate__max_prompts_per_domain=2,
        logging__tensorboard="false",
    )


@pytest.mark.parametrize("case", CASES)
def test_a_failed_save_ends_the_run_and_costs_nothing(
    tiny_world: World, clean: Path, tmp_path: Path, case: str
) -> None:
    point, action, remedy = CASES[case]
    is_async = case in ("full", "files too large")
    overrides, run = run_words(tiny_world, tmp_path, "hit", is_async=is_async), tmp_path / "hit"
    first = Trainer(overrides=overrides, run=run, prepare=partial(at_second, point, action))
    (failed,) = run_trainers([first])
    assert failed.code == 1, failed.errors
    (line,) = failed.errors.splitlines()
    assert line.startswith("error: ") and "step-000004.part cannot be written" in line
    assert remedy in line and line.endswith("earlier checkpoints stay")
    newest = find_latest(run / "checkpoints")
    assert newest is not None and newest.name == "step-000002"
    verify(newest)
    (second,) = run_trainers([Trainer(overrides=overrides, run=run)])
    assert (second.code, second.errors) == (0, "")
    assert "continuing from step 2" in second.output
    kills.assert_equal_runs(run, clean, steps=STEPS)
