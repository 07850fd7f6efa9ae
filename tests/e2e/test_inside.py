"""Whole runs whose teachers lie on the student's ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mopd.demo import World
from tests.helpers import inside
from tests.helpers.dist import RankError, run_ranks
from tests.helpers.runs import ROOT, environment, step_lines, summary, train_here, words

TP2 = {"student__parallel__tensor_model_parallel_size": 2}
BOTH = {f"teachers__{name}__backend__type": "megatron" for name in ("sort", "upper")}


@pytest.mark.e2e
def test_a_step_is_that_of_teachers_in_the_leads_process(tiny_world: World, tmp_path: Path) -> None:
    reference = words(tiny_world, tmp_path, "hf", train__steps=2)
    run_ranks(train_here, 1, "mopd_ctkd", reference, timeout=120)
    replay = {"rollout__backend__type": "replay", "rollout__backend__path": tmp_path / "hf"}
    overrides = words(tiny_world, tmp_path, "inside", train__steps=2, **BOTH, **TP2, **replay)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    found = subprocess.run(
        [*torchrun, "--standalone", "launch/train.py", "recipe=mopd_ctkd", *overrides],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert found.returncode == 0, found.stderr
    ours, theirs = step_lines(tmp_path / "inside"), step_lines(tmp_path / "hf")
    assert len(ours) == len(theirs) == 2 and ours[0].keys() == theirs[0].keys()
    for key in ("loss", "grad_norm", "loss/sort", "loss/upper", "kl/sort", "kl/upper"):
        assert ours[0][key] == pytest.approx(theirs[0][key], rel=1e-4), key
    for key in ("masked", "scored/sort", "scored/upper", "alignment/sort"):
        assert ours[0][key] == theirs[0][key] != 0 or key == "masked", key
    assert ours[1]["loss"] == pytest.approx(theirs[1]["loss"], rel=1e-3)
    assert all(
        found["teacher"] is None for found in summary(tmp_path / "inside")["domains"].values()
    )


@pytest.mark.e2e
def test_a_killed_run_continues_bitwise(tiny_world: World, tmp_path: Path) -> None:
    """Sampling ahead, with a teacher of each kind: the lead's replies are read from the journal,
    the others' computed again."""
    keys: dict[str, Any] = {"train__steps": 4, "rollout__max_staleness": 1, **TP2}
    keys |= {"teachers__sort__backend__type": "megatron", "checkpoint__save_interval": 2}
    whole, killed = (words(tiny_world, tmp_path, name, **keys) for name in ("whole", "killed"))
    run_ranks(train_here, 2, "mopd_ctkd", whole, timeout=120)
    with pytest.raises(RankError, match="died"):
        run_ranks(inside.train_and_die, 2, "mopd_ctkd", killed, 3, timeout=120)
    run = tmp_path / "killed"
    assert len(step_lines(run)) == 3 and (run / "checkpoints" / "step-000002").is_dir()
    run_ranks(train_here, 2, "mopd_ctkd", killed, timeout=120)
    assert step_lines(run) == step_lines(tmp_path / "whole")
    one, two = (tmp_path / n / "hf" / "model.safetensors" for n in ("whole", "killed"))
    assert one.read_bytes() == two.read_bytes()
    assert summary(run)["answers"] == summary(tmp_path / "whole")["answers"]


@pytest.mark.e2e
def test_a_student_learns_from_itself_with_a_hint(tiny_world: World, tmp_path: Path) -> None:
    """Context distillation: the adapter learns what the student does with the prefix."""
    keys: dict[str, Any] = {"teachers__base__backend__type": "self", "student__lora__rank": 8}
    keys |= {"teachers__base__privileged__prefix": "987 ZZ " * 20, "distillation__top_k": "null"}
    keys |= {"student__optimizer__lr": 3e-3, "train__steps": 12, **TP2}
    worlds = ("teachers.sort.", "teachers.upper.")
    kept = [w for w in words(tiny_world, tmp_path, "self", **keys) if not w.startswith(worlds)]
    run_ranks(train_here, 2, "mopd_kl", kept, timeout=120)
    lines = step_lines(tmp_path / "self")
    assert lines[0]["kl/base"] > 1e-3
    assert lines[-1]["kl/base"] < 0.6 * lines[0]["kl/base"]
