"""A whole training on the NPU's code path, with a stand-in for torch_npu on the host."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mopd.demo import World
from tests.helpers.runs import ROOT, command, environment, launch, step_lines, words

STAND_IN = ROOT / "tests" / "helpers" / "torch_npu_stand_in"
# what a device may change: sums in another order, and where memory is counted
SAME = ("loss", "grad_norm", "kl/sort", "kl/upper")


@pytest.mark.e2e
@pytest.mark.slow
def test_a_run_on_the_stand_in_takes_the_steps_of_the_cpu(
    tiny_world: World, tmp_path: Path
) -> None:
    steps: dict[str, Any] = {"train__steps": 2, "student__dtype": "bfloat16"}
    on_cpu = words(tiny_world, tmp_path, "cpu", run__device="cpu", **steps)
    done = launch("mopd_ctkd", on_cpu)
    assert done.returncode == 0, done.stderr
    replay = {"rollout__backend__type": "replay", "rollout__backend__path": tmp_path / "cpu"}
    on_npu = words(tiny_world, tmp_path, "npu", run__device="npu", **steps, **replay)
    done = subprocess.run(
        command("mopd_ctkd", on_npu),
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": os.pathsep.join([str(STAND_IN), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = step_lines(tmp_path / "npu"), step_lines(tmp_path / "cpu")
    assert len(ours) == len(theirs) == 2
    for mine, other in zip(ours, theirs, strict=True):
        for key in SAME:
            assert mine[key] == pytest.approx(other[key], rel=1e-3), key
