"""Two ranks under torchrun: one is killed, then the job is told to stop; bit by bit the same."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mopd.demo import World
from mopd.storage.manifest import list_checkpoints
from tests.faults import kills
from tests.helpers.dist import run_ranks
from tests.helpers.runs import ROOT, environment, summary, train_here, words

pytestmark = [pytest.mark.dist, pytest.mark.e2e]

STEPS = 30
PATIENCE_S = 30.0  # for the others to end


def start(overrides: list[str]) -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*torchrun, "--nproc-per-node", "2", "launch/train.py", "recipe=mopd_ctkd", *overrides],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ranks_of(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    children = psutil.Process(process.pid).children()
    return {int(child.environ()["RANK"]): child for child in children}


def until(process: subprocess.Popen[str], run: Path, steps: int) -> None:
    if not kills.reached(process, run, steps):
        raise AssertionError(process.communicate()[0])


def ended(process: subprocess.Popen[str], ranks: dict[int, psutil.Process]) -> tuple[float, str]:
    """Seconds until all ranks are gone, and what a user saw."""
    began = time.monotonic()
    _, alive = psutil.wait_procs(list(ranks.values()), timeout=60)
    seconds = time.monotonic() - began
    assert not alive
    return seconds, process.communicate(timeout=60)[0]


def test_a_rank_is_killed_and_later_the_job_is_told_to_stop(
    tiny_world: World, tmp_path: Path
) -> None:
    given = {
        "train__steps": STEPS,
        "checkpoint__save_interval": 4,
        "evaluate__max_prompts_per_domain": 2,
        "logging__tensorboard": "false",
    }
    run_ranks(train_here, 2, "mopd_ctkd", words(tiny_world, tmp_path, "whole", **given))
    overrides, run = words(tiny_world, tmp_path, "hit", **given), tmp_path / "hit"

    process = start(overrides)
    try:
        until(process, run, 6)
        ranks = ranks_of(process)
        ranks[1].kill()
        seconds, output = ended(process, ranks)
    finally:
        process.kill()
    assert seconds < PATIENCE_S and process.returncode == 1
    said = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith("error: rank 0: another rank ended"), output
    assert "[rank0]" not in output  # no traceback of an innocent rank
    cause = output.split("Root Cause (")[1]
    assert "rank      : 1 (local_rank: 1)" in cause and "(SIGKILL)" in cause
    before = kills.steps_of(run)
    assert before < STEPS

    process = start(overrides)
    try:
        until(process, run, before + 4)
        ranks = ranks_of(process)
        process.send_signal(signal.SIGTERM)
        seconds, output = ended(process, ranks)
    finally:
        process.kill()
    newest = list_checkpoints(run / "checkpoints")[-1]
    steps = kills.steps_of(run)
    assert newest.step == steps < STEPS
    assert f"SIGTERM: ended after step {steps}, with a checkpoint of it" in output
    assert seconds < PATIENCE_S

    run_ranks(train_here, 2, "mopd_ctkd", overrides)
    assert kills.lines(run) == kills.lines(tmp_path / "whole")
    assert kills.weights(run) == kills.weights(tmp_path / "whole")
    assert summary(run)["answers"] == summary(tmp_path / "whole")["answers"]
