"""Evaluations on the way: they disturb nothing, continue after a kill, and end a run early."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mopd.demo import World
from tests.helpers.dist import run_ranks
from tests.helpers.runs import step_lines, summary, train_here, words

pytestmark = pytest.mark.dist

EVERY = {
    "evaluate__interval": 2,
    "evaluate__max_prompts_per_domain": 8,
    "evaluate__kl_prompts_per_domain": 3,
    "evaluate__teachers": "false",
}


def train(
    world: World, directory: Path, name: str, *, ranks: int = 1, recipe: str = "mopd_ctkd", **keys
) -> list[dict[str, Any]]:
    run_ranks(train_here, ranks, recipe, words(world, directory, name, **keys), timeout=200)
    return step_lines(directory / name)


def parted(lines: list[dict[str, Any]]) -> tuple[list[dict], list[dict]]:
    """Lines of steps, and lines of evaluations."""
    of_steps = [line for line in lines if "loss" in line]
    return of_steps, [line for line in lines if "loss" not in line]


@pytest.fixture(scope="module")
def evaluated(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps with a thread that samples ahead, evaluated after every second."""
    directory = tmp_path_factory.mktemp("evaluated")
    train(tiny_world, directory, "one", rollout__max_staleness=1, **EVERY)
    return directory / "one"


def test_an_evaluation_changes_nothing_of_the_training(
    evaluated: Path, tiny_world: World, tmp_path: Path
) -> None:
    plain = train(tiny_world, tmp_path, "plain", rollout__max_staleness=1)
    of_steps, evaluations = parted(step_lines(evaluated))
    assert of_steps == plain
    assert summary(evaluated)["answers"] == summary(tmp_path / "plain")["answers"]
    assert summary(evaluated)["chunks"] == summary(tmp_path / "plain")["chunks"]
    for part in ("hf/model.safetensors", "journal/rollouts-0.jsonl"):
        assert (evaluated / part).read_bytes() == (tmp_path / "plain" / part).read_bytes()
    assert [line["step"] for line in evaluations] == [1, 3]
    for line in evaluations:
        for domain in ("sort", "upper"):
            assert 0 <= line[f"eval/accuracy/{domain}"] <= 1
            assert line[f"eval/kl/{domain}"] > 0


def test_the_summary_lists_them_all(evaluated: Path) -> None:
    found = summary(evaluated)
    assert [one["step"] for one in found["evaluations"]] == [0, 2, 4]
    last = found["evaluations"][-1]
    assert last["eval/accuracy/sort"] == found["domains"]["sort"]["after"]
    assert found["stopped_early"] is None and found["best_step"] in (0, 2, 4)
    _, lines = parted(step_lines(evaluated))
    assert {k: v for k, v in lines[-1].items() if k != "step"} == {
        k: v for k, v in last.items() if k != "step"
    }


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(2, {}), (2, {"student__parallel__pipeline_model_parallel_size": 2})],
    ids=["dp2", "pp2"],
)
def test_layouts_measure_the_same(
    ranks: int, parallel: dict[str, int], evaluated: Path, tiny_world: World, tmp_path: Path
) -> None:
    keys = {**EVERY, **parallel, "train__steps": 2, "rollout__max_staleness": 1}
    train(tiny_world, tmp_path, "two", ranks=ranks, **keys)
    ours = summary(tmp_path / "two")["evaluations"]
    theirs = summary(evaluated)["evaluations"]
    for key, value in theirs[0].items():
        assert ours[0][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert ours[1]["step"] == 2 and ours[1].keys() == theirs[1].keys()


def forget_after(run: Path, step: int) -> None:
    """The run as a kill between two checkpoints leaves it."""
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    (run / "checkpoints/latest").write_text(f"step-{step:06d}")
    (run / "summary.json").unlink()
    shutil.rmtree(run / "hf")


@pytest.mark.parametrize("kept", [2, 3])
def test_a_run_that_was_killed_measures_nothing_twice(
    kept: int, evaluated: Path, tiny_world: World, tmp_path: Path
) -> None:
    """Killed right after an evaluation, and a step later."""
    keys = {"rollout__max_staleness": 1, "checkpoint__save_interval": 1, **EVERY}
    keys["checkpoint__keep_last"] = 9
    train(tiny_world, tmp_path, "killed", **keys)
    run = tmp_path / "killed"
    before = summary(run)
    forget_after(run, kept)
    train(tiny_world, tmp_path, "killed", **keys)
    assert step_lines(run) == step_lines(evaluated)
    after = summary(run)
    assert after["evaluations"] == before["evaluations"] == summary(evaluated)["evaluations"]
    assert (run / "hf/model.safetensors").read_bytes() == (
        evaluated / "hf/model.safetensors"
    ).read_bytes()


def test_patience_ends_a_run_and_the_best_has_a_checkpoint(
    tiny_world: World, tmp_path: Path
) -> None:
    """A model that knows nothing stays at 0 right answers: no evaluation beats the first."""
    keys = {**EVERY, "evaluate__patience": 2, "checkpoint__keep_best": 1, "train__steps": 20}
    keys |= {"checkpoint__save_interval": 100, "checkpoint__keep_last": 9}
    lines = train(tiny_world, tmp_path, "stopped", **keys, rollout__max_staleness=1)
    found = summary(tmp_path / "stopped")
    assert [one["step"] for one in found["evaluations"]] == [0, 2, 4]
    assert found["stopped_early"] == found["steps"] == 4 and found["best_step"] == 0
    assert len(parted(lines)[0]) == 4
    assert (tmp_path / "stopped/hf/model.safetensors").is_file()
    saved = sorted(path.name for path in (tmp_path / "stopped/checkpoints").glob("step-*"))
    assert saved == ["step-000002", "step-000004"]
    forget_after(tmp_path / "stopped", 4)  # killed before it had written its results
    train(tiny_world, tmp_path, "stopped", **keys, rollout__max_staleness=1)
    assert summary(tmp_path / "stopped")["evaluations"] == found["evaluations"]
    assert json.loads((tmp_path / "stopped/summary.json").read_text())["stopped_early"] == 4
