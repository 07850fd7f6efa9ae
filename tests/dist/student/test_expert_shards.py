"""Experts reshard, too: from and to other expert-parallel sizes."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch

from mopd.config.schema import OptimizerSection
from mopd.student.checkpoint import Saver, load
from mopd.student.step import Student
from tests.dist.student import resharding, worlds
from tests.dist.student.resharding import Whole, differences, whole
from tests.dist.student.worlds import Layout, Run
from tests.helpers.dist import run_ranks


def build(run: Run, split: bool, seed: int) -> Student:
    """With random weights and moments: nothing is trained here."""
    student = worlds.build(run, section=OptimizerSection(use_distributed_optimizer=split))
    for shard in resharding.shards_of(student):  # the same numbers, whoever holds them
        generator = torch.Generator().manual_seed(seed + zlib.crc32(shard.key.encode()))
        numbers = torch.randn(shard.whole, generator=generator)
        box = tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.data.shape, strict=True))
        with torch.no_grad():
            shard.data.copy_(numbers[box])
    return student


def save(run: Run, split: bool, directory: str) -> Whole:
    student = build(run, split, seed=1)
    Saver(Path(directory), student=student, keep_last=1).save({"step": 1})
    return whole(student)


def restore(run: Run, split: bool, directory: str) -> tuple[bool, Whole]:
    student = build(run, split, seed=2)
    before = whole(student)
    load(Path(directory) / "step-000001", student=student, seed=3)
    after = whole(student)
    return len(differences(before, after)) >= len(after.tensors), after


def test_experts_reshard(tmp_path: Path) -> None:
    model_dir = str(worlds.make_model("moe-mixed", tmp_path / "moe"))
    layouts: list[tuple[Layout, bool]] = [
        (Layout(dp=2, ep=2), False),
        (Layout(dp=2, ep=2), True),
        (Layout(dp=4, ep=2), True),
        (Layout(tp=2, dp=2, ep=2, sequence_parallel=True), False),
        (Layout(pp=2, dp=2, ep=2), True),
    ]
    for number, (layout, split) in enumerate(layouts):
        run, directory = Run(model_dir=model_dir, layout=layout), str(tmp_path / str(number))
        state, *_ = run_ranks(save, layout.world_size, run, split, directory)
        experts = [k for k in state.tensors if "experts" in k]
        assert any(key.startswith("optimizer.exp_avg.") for key in experts)
        for target in [(Layout(), False), layouts[number - 1]]:
            other = Run(model_dir=model_dir, layout=target[0])
            for changed, found in run_ranks(
                restore, target[0].world_size, other, target[1], directory
            ):
                assert changed and differences(found, state) == []


def test_frozen_experts_have_no_moments(tmp_path: Path) -> None:
    model_dir = str(worlds.make_model("moe", tmp_path / "moe"))
    frozen = {"freeze": (r"model\.layers\.0\.mlp\.experts\.[01]\..*",)}  # all of one rank's
    one = Run(model_dir=model_dir, student=frozen)
    two = Run(model_dir=model_dir, student=frozen, layout=Layout(dp=2, ep=2))
    for split in (False, True):
        directory = str(tmp_path / str(split))
        state, *_ = run_ranks(save, 2, two, split, directory)
        layer = "decoder.layers.0.mlp.experts.experts.linear_fc2.weight"
        names = [k for k in state.tensors if k.startswith(f"optimizer.exp_avg.{layer}")]
        assert [name.rpartition(".")[2] for name in sorted(names)] == ["2", "3"]
        for changed, found in run_ranks(restore, 1, one, False, directory):
            assert changed and differences(found, state) == []
