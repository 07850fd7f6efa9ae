"""Engines on shared devices: a run whose teachers take turns, with each other or the student."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mopd.demo import World
from mopd.serving.lease import LEASE_VARIABLE, OWNER_VARIABLE
from mopd.student.away import StudentState
from tests.helpers.dist import run_ranks
from tests.helpers.runs import step_lines, train_here, words
from tests.helpers.small_server import SERVE, left_over, small_server, starts

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    script = small_server(tmp_path_factory.mktemp("engines"), script=SERVE)
    yield script
    assert left_over(script) == []


def moves_of_the_student(recipe: str, arguments: list[str]) -> list[str]:
    """Trains; how often its state went and came."""
    moves: list[str] = []
    real = {name: getattr(StudentState, name) for name in ("away", "back")}
    try:
        for name, move in real.items():

            def counted(state: StudentState, move: Any = move, name: str = name) -> None:
                moves.append(name)
                move(state)

            setattr(StudentState, name, counted)
        train_here(recipe, arguments)
    finally:
        for name, move in real.items():
            setattr(StudentState, name, move)
    return moves


def two_steps(
    world: World, directory: Path, name: str, script: Path, **keys: Any
) -> tuple[list[dict[str, Any]], list[str]]:
    settings: dict[str, Any] = {
        "train__steps": 2,
        "distillation__top_k": 16,
        "evaluate__max_prompts_per_domain": 2,
    }
    for teacher in world.teachers:
        settings[f"teachers__{teacher}__backend__type"] = "mopd"
        settings[f"teachers__{teacher}__backend__server__python"] = script
    arguments = words(world, directory, name, **settings, **keys)
    moves = run_ranks(moves_of_the_student, 1, "mopd_ctkd", arguments, timeout=200)[0]
    return step_lines(directory / name), moves


@pytest.fixture(scope="module")
def dedicated(
    tiny_world: World, script: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    lines, moves = two_steps(tiny_world, tmp_path_factory.mktemp("runs"), "dedicated", script)
    assert moves == []
    assert not any(LEASE_VARIABLE in one["env"] for one in starts(script))
    return lines


@pytest.mark.parametrize("pool", ["judges", "student"])
def test_engines_that_take_turns_teach_as_those_with_devices_of_their_own(
    tiny_world: World, script: Path, tmp_path: Path, dedicated: list[dict[str, Any]], pool: str
) -> None:
    known = len(starts(script))
    keys = {f"teachers__{teacher}__pool": pool for teacher in tiny_world.teachers}
    keys[f"pools__{pool}__shared"] = "true"
    lines, moves = two_steps(tiny_world, tmp_path, "shared", script, **keys)
    assert lines == dedicated and len(lines) == 2
    started = [one["env"] for one in starts(script)[known:]]
    assert {one[OWNER_VARIABLE] for one in started} == {
        f"teachers.{teacher}" for teacher in tiny_world.teachers
    }
    assert len({one[LEASE_VARIABLE] for one in started}) == 1
    if pool == "student":  # it went as often as it came, and once when it was built
        assert moves.count("away") == moves.count("back") + 1 > 5
    else:
        assert moves == []
