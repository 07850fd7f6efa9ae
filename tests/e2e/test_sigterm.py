"""SIGTERM: all ranks save after the same step and end; continued, the run is bit by bit whole."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mopd.demo import World
from mopd.errors import Stopped
from mopd.student.checkpoint import list_checkpoints, verify
from tests.faults import kills
from tests.helpers.dist import run_ranks
from tests.helpers.runs import held, summary, train_here, words

pytestmark = [pytest.mark.dist, pytest.mark.e2e]

STEPS = 10
KEYS: dict[str, Any] = {
    "train__steps": STEPS,
    "checkpoint__save_interval": STEPS,  # whatever is there before was saved because of it
    "evaluate__max_prompts_per_domain": 2,
    "logging__tensorboard": "false",
    "student__optimizer__lr": 3e-3,
}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one, ahead, async": (1, {"rollout__max_staleness": 1, "checkpoint__async_save": "true"}),
    "tp2, async": (
        2,
        {"student__parallel__tensor_model_parallel_size": 2, "checkpoint__async_save": "true"},
    ),
}


def stopped_here(overrides: list[str], run: str, by: int) -> int:
    """Trains until rank ``by`` alone is told to stop; the step that this rank has ended after."""

    def tell() -> None:
        while kills.steps_of(Path(run)) < 3:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)
        told.touch()

    told = Path(run) / "told"
    if int(os.environ["RANK"]) == by:
        threading.Thread(target=tell, daemon=True).start()
    try:
        with held(STEPS - 4, told):
            train_here("mopd_ctkd", overrides)
    except Stopped as stopped:
        assert not dist.is_initialized()
        return int(str(stopped).split("step ")[1].split(",")[0])
    raise AssertionError("the run was not stopped")


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_told_to_stop_continues_bitwise(
    tiny_world: World, tmp_path: Path, case: str
) -> None:
    size, keys = CASES[case]
    whole = words(tiny_world, tmp_path, "whole", **KEYS, **keys)
    run_ranks(train_here, size, "mopd_ctkd", whole, timeout=60)
    told = words(tiny_world, tmp_path, "told", **KEYS, **keys)
    run = tmp_path / "told"
    steps = run_ranks(stopped_here, size, told, str(run), size - 1, timeout=60)
    assert len(set(steps)) == 1 and 3 <= steps[0] < STEPS
    newest = list_checkpoints(run / "checkpoints")[-1]
    assert newest.step == steps[0] == kills.steps_of(run)
    verify(newest.path)
    run_ranks(train_here, size, "mopd_ctkd", told, timeout=60)
    kills.assert_equal_runs(run, tmp_path / "whole", steps=STEPS)
    assert summary(run)["answers"] == summary(tmp_path / "whole")["answers"]
