"""In small: the student learns from its teachers, in its own tokens, and from nothing else.

200 steps on the embedded world, all held-out prompts; the full budget is ``make train``.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from mopd.demo import World
from tests.helpers.runs import start, summary

STEPS = 200
CONTROLS = {
    "ctkd": [],
    "position": ["distillation.alignment=position"],
    "uniform": ["teachers.sort.backend.type=uniform", "teachers.upper.backend.type=uniform"],
    "swapped": ["teachers.sort.domains=[upper]", "teachers.upper.domains=[sort]"],
}

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All runs, two at a time; name -> (exit code, stderr, summary)."""
    directory = tmp_path_factory.mktemp("learning")
    results: dict[str, Any] = {}
    names = list(CONTROLS)
    for pair in (names[:2], names[2:]):
        processes = {name: begin(name, directory, world) for name in pair}
        try:
            for name, process in processes.items():
                _, errors = process.communicate(timeout=600)
                results[name] = (process.returncode, errors, summary(directory / name))
        finally:
            for process in processes.values():
                process.kill()
                process.communicate()
    return results


def begin(name: str, directory: Path, world: World) -> subprocess.Popen[str]:
    overrides = [
        f"run.dir={directory}",
        f"run.name={name}",
        "run.threads=1",
        f"cache_dir={world.path.parent.parent}",
        f"train.steps={STEPS}",
        *CONTROLS[name],
    ]
    return start("mopd_ctkd", overrides)


def gain(found: dict[str, Any], teacher: dict[str, float]) -> dict[str, float]:
    """Headroom recovered, against the real teachers' accuracies."""
    return {
        domain: (result["after"] - result["before"]) / (teacher[domain] - result["before"])
        for domain, result in found["domains"].items()
    }


def test_the_student_learns_both_domains(runs: dict[str, Any], world: World) -> None:
    code, errors, found = runs["ctkd"]
    assert code == 0, errors
    assert found["learned"] is True and found["world"] == world.path.name
    for domain, result in found["domains"].items():
        assert 0.05 <= result["before"] <= 0.40, domain
        assert result["teacher"] > 0.95
        assert result["headroom_recovered"] > 0.45, domain
        assert result["canonical_after"] > result["canonical_before"] - 0.35, domain


def test_the_world_is_not_one_to_one(runs: dict[str, Any], world: World) -> None:
    canonical = world.report["chunks"]
    for teacher in world.teachers:
        assert canonical[teacher]["canonical"]["tokens_outside_1_1"] >= 0.25
    shares = runs["ctkd"][2]["chunks_of_all_teachers"]
    assert shares["chunks 1-n"] >= 0.05 and shares["chunks n-1"] >= 0.04


@pytest.mark.parametrize("name", ["uniform", "swapped"])
def test_teachers_that_know_nothing_teach_nothing(name: str, runs: dict[str, Any]) -> None:
    code, errors, found = runs[name]
    teacher = {d: r["teacher"] for d, r in runs["ctkd"][2]["domains"].items()}
    assert max(gain(found, teacher).values()) <= 0.1
    assert code == 1 and "learned nothing" in errors


def test_pairing_by_position_loses_the_headroom(runs: dict[str, Any]) -> None:
    real = runs["ctkd"][2]
    teacher = {d: r["teacher"] for d, r in real["domains"].items()}
    found, ours = gain(runs["position"][2], teacher), gain(real, teacher)
    assert sum(found.values()) <= 0.5 * sum(ours.values())
