"""A run that is killed continues as if nothing had happened."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mopd.demo import World
from mopd.student.checkpoint import list_checkpoints
from mopd.tokens.chat import ChatTokenizer
from tests.helpers.dist import run_ranks
from tests.helpers.runs import launch, start, step_lines, summary, train_here, words
from tests.helpers.stub_scorers import PrefixScorer
from tests.helpers.stub_server import StubServer

STEPS = 20


def run_words(world: World, directory: Path, name: str) -> list[str]:
    return words(
        world,
        directory,
        name,
        train__steps=STEPS,
        checkpoint__save_interval=4,
        student__optimizer__lr=3e-3,
    )


def kill_after(
    lines: int, recipe_words: list[str], run: Path, how: signal.Signals = signal.SIGKILL
) -> tuple[int, str]:
    """Starts the run and sends ``how`` once it has logged ``lines`` steps; exit code and stderr."""
    process = start("mopd_ctkd", recipe_words, hold=(lines + 4, run / "never"))
    try:
        deadline = time.monotonic() + 120
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= lines):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(how)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    return process.returncode, errors


@pytest.mark.e2e
def test_a_killed_run_continues_bitwise(tiny_world: World, tmp_path: Path) -> None:
    whole = launch("mopd_ctkd", run_words(tiny_world, tmp_path, "whole"))
    assert whole.returncode == 0, whole.stderr
    overrides = run_words(tiny_world, tmp_path, "killed")
    kill_after(6, overrides, tmp_path / "killed")
    assert len(step_lines(tmp_path / "killed")) < STEPS
    continued = launch("mopd_ctkd", overrides)
    assert continued.returncode == 0, continued.stderr
    expected, found = step_lines(tmp_path / "whole"), step_lines(tmp_path / "killed")
    assert [line["step"] for line in found] == list(range(STEPS))
    assert found == expected
    ours, theirs = summary(tmp_path / "killed"), summary(tmp_path / "whole")
    assert ours.pop("seconds") > 0 and theirs.pop("seconds") > 0
    assert ours == theirs
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "killed/hf" / file).read_bytes() == (
            tmp_path / "whole/hf" / file
        ).read_bytes()
    journals = [
        (tmp_path / name / "journal/rollouts-0.jsonl").read_text() for name in ("killed", "whole")
    ]
    assert journals[0] == journals[1]


@pytest.mark.e2e
def test_an_interrupt_ends_quietly_and_the_run_continues(tiny_world: World, tmp_path: Path) -> None:
    overrides = run_words(tiny_world, tmp_path, "stopped")
    code, errors = kill_after(6, overrides, tmp_path / "stopped", signal.SIGINT)
    assert code == 130 and "Traceback" not in errors
    continued = launch("mopd_ctkd", overrides)
    assert continued.returncode == 0, continued.stderr
    assert "continuing from step" in continued.stdout
    assert [line["step"] for line in step_lines(tmp_path / "stopped")] == list(range(STEPS))


def served_words(world: World, directory: Path, url: str, **keys: object) -> list[str]:
    return words(
        world,
        directory,
        "killed",
        train__steps=STEPS,
        checkpoint__save_interval=6,
        rollout__max_staleness=1,
        teachers__sort__backend__type="vllm",
        teachers__sort__backend__urls=f"[{url}]",
        **keys,
    )


class Nearly:
    """The same teacher up to its last digits, as a server is after a restart."""

    def __init__(self, scorer: PrefixScorer) -> None:
        self._scorer = scorer

    def __call__(self, ids: Sequence[int]) -> np.ndarray:
        return self._scorer(ids) - 0.01


@pytest.mark.e2e
@pytest.mark.parametrize("level", ["full", "digest"])
def test_replies_of_a_killed_run_are_used_again_or_compared(
    tiny_world: World, tmp_path: Path, level: str
) -> None:
    """The server does not answer twice alike, which must not show before the last step."""
    tokenizer = ChatTokenizer.load(tiny_world.teachers["sort"])
    run, scorer = tmp_path / "killed", PrefixScorer(tokenizer.vocabulary.size)
    with StubServer(scorer) as stub:
        overrides = served_words(tiny_world, tmp_path, stub.url, journal__replies=level)
        kill_after(9, overrides, run)
        port, before = stub.port, step_lines(run)
    with StubServer(Nearly(scorer), port=port):
        continued = launch("mopd_ctkd", overrides)
    assert continued.returncode == 0, continued.stderr
    after = step_lines(run)
    assert len(after) == STEPS and 9 <= len(before) < STEPS
    whole = {"issued": 8 * STEPS, "trained": 8 * STEPS, "dropped": {}, "in_flight": 0}
    assert summary(run)["answers"] == whole
    again = range(6 * (len(before) // 6), len(before))
    if level == "full":
        assert after[: len(before)] == before
        assert not any("rescored/nats" in line for line in after)
    else:
        assert all(after[step]["rescored/nats"] > 0.01 for step in again)
        assert all(after[step]["rescored/other_tokens"] == 0 for step in again)
    kept = sorted(path.stem for path in (run / "journal" / "replies-0").glob("*"))
    assert kept == ([f"{step:08d}" for step in range(18, STEPS)] if level == "full" else [])


@pytest.mark.e2e
def test_a_run_does_not_go_on_with_another_teacher(tiny_world: World, tmp_path: Path) -> None:
    size = ChatTokenizer.load(tiny_world.teachers["sort"]).vocabulary.size
    with StubServer(PrefixScorer(size)) as stub:
        overrides = served_words(tiny_world, tmp_path, stub.url)
        kill_after(2, overrides, tmp_path / "killed")
        port = stub.port
    before = step_lines(tmp_path / "killed")
    with StubServer(PrefixScorer(size, seed=1), port=port):
        continued = launch("mopd_ctkd", overrides)
    assert continued.returncode == 2
    assert "teachers.sort: is not the teacher that" in continued.stderr
    assert step_lines(tmp_path / "killed") == before


@pytest.mark.e2e
def test_replies_of_another_layout_are_not_taken(tiny_world: World, tmp_path: Path) -> None:
    """Two replicas that end before their first checkpoint, and then one."""
    overrides = words(tiny_world, tmp_path, "halved", train__steps=6, checkpoint__save_interval=6)
    run = tmp_path / "halved"
    run_ranks(train_here, 2, "mopd_ctkd", overrides, timeout=120)
    two = step_lines(run)
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    run_ranks(train_here, 1, "mopd_ctkd", overrides, timeout=120)
    one = step_lines(run)
    assert all(line.get("dropped/unscored", 0.0) == 0.0 for line in one)
    assert [x["loss"] for x in one] == pytest.approx([x["loss"] for x in two], rel=1e-3)
    assert sorted(path.name for path in (run / "journal").iterdir()) == [
        "replies-0",
        "replies-0.jsonl",
        "rollouts-0.jsonl",
    ]


@pytest.mark.e2e
def test_a_run_continues_in_another_layout(tiny_world: World, tmp_path: Path) -> None:
    """Two tensor-parallel ranks that save in the background; then two replicas, split optimizer."""
    keys = {"train__steps": 6, "checkpoint__save_interval": 2, "checkpoint__keep_last": 3}
    keys["checkpoint__async_save"] = "true"
    whole = words(tiny_world, tmp_path, "whole", **keys)
    run_ranks(train_here, 1, "mopd_ctkd", whole, timeout=120)
    expected = step_lines(tmp_path / "whole")
    replay = {
        "rollout__backend__type": "replay",
        "rollout__backend__path": tmp_path / "whole" / "journal",
    }
    overrides = words(tiny_world, tmp_path, "moved", **keys, **replay)
    split = "student.parallel.tensor_model_parallel_size=2"
    run_ranks(train_here, 2, "mopd_ctkd", [*overrides, split], timeout=120)
    run = tmp_path / "moved"
    found = [info.step for info in list_checkpoints(run / "checkpoints")]
    assert found == [2, 4, 6]
    (run / "checkpoints" / "latest").write_text("step-000002")
    (run / "summary.json").unlink()
    other = "student.optimizer.use_distributed_optimizer=true"
    run_ranks(train_here, 2, "mopd_ctkd", [*overrides, other], timeout=120)
    lines = step_lines(run)
    assert [line["step"] for line in lines] == list(range(6))
    losses = [line["loss"] for line in expected]
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-4)
    assert list_checkpoints(run / "checkpoints")[-1].layout["data"] == 2


@pytest.mark.e2e
def test_a_finished_run_and_a_changed_recipe(tiny_world: World, tmp_path: Path) -> None:
    overrides = words(tiny_world, tmp_path, "done", train__steps=1)
    assert launch("mopd_ctkd", overrides).returncode == 0
    again = launch("mopd_ctkd", overrides)
    assert again.returncode == 0 and "is finished" in again.stdout
    other = launch("mopd_ctkd", [*overrides, "run.seed=9"])
    assert other.returncode == 2
    assert "other settings (run.seed)" in other.stderr and other.stderr.count("\n") == 1
