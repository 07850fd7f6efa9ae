"""Resuming changes no bit, damage is seen, old checkpoints go."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from mopd.errors import ArtifactError
from mopd.losses.base import LossOutput
from mopd.student import checkpoint
from mopd.student.step import StepResult, Student
from mopd.types import MicroBatch, StepBatch
from tests.dist.student import worlds
from tests.dist.student.worlds import Layout, NextToken, Run, step_batch
from tests.helpers.dist import RankError, run_ranks


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(worlds.make_model("qwen3", tmp_path_factory.mktemp("checkpoint") / "qwen3"))


class Noisy:
    """The shared loss, scaled by draws from every generator that a checkpoint holds."""

    def __init__(self, student: Student) -> None:
        self._loss = NextToken(student.model)

    def __call__(
        self, logits: torch.Tensor, micro_batch: MicroBatch, batch: StepBatch
    ) -> LossOutput:
        output = self._loss(logits, micro_batch, batch)
        noise = float(torch.rand(())) + random.random() + float(np.random.rand())
        return LossOutput(total=output.total * (1.0 + noise), metrics=output.metrics)


def build(run: Run) -> Student:
    plain = worlds.build(run)
    random.seed(0)
    np.random.seed(0)
    return Student(
        model=plain.model,
        optimizer=plain.optimizer,
        scheduler=plain.scheduler,
        loss_function=Noisy(plain),
        clip_grad=0.5,
        fused_head=True,
    )


Outcome = tuple[list[StepResult], dict[str, torch.Tensor]]


def tensors_of(student: Student) -> dict[str, torch.Tensor]:
    """This rank's weights, main weights and optimizer state."""
    found = {}
    for name, parameter in student.model.named_parameters():
        main = getattr(parameter, "main_param", parameter)
        found[name] = parameter.detach().clone()
        found["main." + name] = main.detach().clone()
        for key, value in student.optimizer.optimizer.state[main].items():
            found[f"{key}.{name}"] = value.clone()
    return found


def advance(student: Student, run: Run, steps: range) -> list[StepResult]:
    dp_rank = student.model.topology.dp_rank
    return [student.train_step(step_batch(s, run=run, dp_rank=dp_rank)) for s in steps]


def straight(run: Run) -> Outcome:
    student = build(run)
    return advance(student, run, range(6))[3:], tensors_of(student)


def first_half(run: Run, directory: str) -> None:
    student = build(run)
    advance(student, run, range(3))
    state = {"step": 3, "position": [1, 2.5, "x"]}
    checkpoint.save(Path(directory), student=student, state=state, keep_last=2)


def second_half(run: Run, directory: str) -> Outcome:
    student = build(run)
    torch.rand(3)  # a restart need not have drawn the same numbers
    path = checkpoint.find_latest(Path(directory))
    assert path is not None
    state = checkpoint.load(path, student=student)
    assert state == {"step": 3, "position": [1, 2.5, "x"]}
    return advance(student, run, range(3, 6)), tensors_of(student)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2), Layout(tp=2, pp=2)], ids=str)
def test_resume_is_bitwise(qwen3: str, tmp_path: Path, layout: Layout, dtype: str) -> None:
    run = Run(model_dir=qwen3, layout=layout, student={"dtype": dtype})
    expected = run_ranks(straight, layout.world_size, run)
    run_ranks(first_half, layout.world_size, run, str(tmp_path))
    resumed = run_ranks(second_half, layout.world_size, run, str(tmp_path))
    for (want_results, want), (got_results, got) in zip(expected, resumed, strict=True):
        assert got_results == want_results
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def save_steps(run: Run, directory: str, steps: list[int]) -> None:
    student = build(run)
    advance(student, run, range(1))
    for step in steps:
        checkpoint.save(Path(directory), student=student, state={"step": step}, keep_last=2)


def load_only(run: Run, directory: str) -> str:
    student = build(run)
    try:
        checkpoint.load(Path(directory), student=student)
    except ArtifactError as error:
        return str(error)
    return ""


def test_prunes_and_points_to_the_latest(qwen3: str, tmp_path: Path) -> None:
    (tmp_path / "step-000001.part").mkdir()
    run_ranks(save_steps, 1, Run(model_dir=qwen3), str(tmp_path), [10, 20, 30, 30])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step-000020", "step-000030"]
    assert checkpoint.find_latest(tmp_path) == tmp_path / "step-000030"
    suffixes = {path.suffix for path in (tmp_path / "step-000030").iterdir()}
    assert suffixes == {".json", ".safetensors"}


def test_damage_is_reported_on_every_rank(qwen3: str, tmp_path: Path) -> None:
    run = Run(model_dir=qwen3, layout=Layout(tp=2))
    run_ranks(save_steps, 2, run, str(tmp_path), [10])
    path = tmp_path / "step-000010"
    shard = path / "shard-tp1-pp0.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    messages = run_ranks(load_only, 2, run, str(path))
    assert all("shard-tp1-pp0.safetensors does not match its SHA-256" in m for m in messages)
    shard.unlink()
    assert all("cannot be read" in m for m in run_ranks(load_only, 2, run, str(path)))


def test_another_layout_is_refused(qwen3: str, tmp_path: Path) -> None:
    run = Run(model_dir=qwen3)
    run_ranks(save_steps, 1, run, str(tmp_path), [10])
    other = Run(model_dir=qwen3, layout=Layout(dp=2))
    messages = run_ranks(load_only, 2, other, str(tmp_path / "step-000010"))
    assert all("resume with the same sizes" in message for message in messages)


def test_latest_that_points_nowhere(tmp_path: Path) -> None:
    assert checkpoint.find_latest(tmp_path) is None
    (tmp_path / "latest").write_text("step-000007")
    with pytest.raises(ArtifactError, match="no manifest"):
        checkpoint.find_latest(tmp_path)


def crash_while_saving(run: Run, directory: str) -> None:
    student = build(run)
    advance(student, run, range(1))

    def fail(*_: object) -> None:
        raise OSError("disk full")

    checkpoint.replace_directory = fail
    checkpoint.save(Path(directory), student=student, state={"step": 20}, keep_last=2)


def test_a_crash_while_saving_leaves_the_previous_checkpoint(qwen3: str, tmp_path: Path) -> None:
    run = Run(model_dir=qwen3)
    run_ranks(save_steps, 1, run, str(tmp_path), [10])
    with pytest.raises(RankError, match="disk full"):
        run_ranks(crash_while_saving, 1, run, str(tmp_path))
    assert checkpoint.find_latest(tmp_path) == tmp_path / "step-000010"
    assert run_ranks(load_only, 1, run, str(tmp_path / "step-000010")) == [""]
