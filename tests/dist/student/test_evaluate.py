"""The losses of a batch without a step: the same numbers, and nothing changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mopd.losses.base import LossOutput
from mopd.student.rng import capture_rng
from mopd.student.step import Companions, Student
from tests.dist.student import worlds
from tests.dist.student.worlds import Layout, NextToken, Run, step_batch
from tests.helpers.dist import run_ranks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(worlds.make_model("qwen3", tmp_path_factory.mktemp("evaluate") / "m"))


def everything(student: Student) -> list[torch.Tensor]:
    """Weights, gradients, the optimizer's state and generators of this rank, copied."""
    found = []
    for _, parameter in student.model.named_parameters():
        found += [parameter, parameter.main_grad]
        state = student.optimizer.optimizer.state
        found += [x for x in state.get(parameter, {}).values() if torch.is_tensor(x)]
    found += list(capture_rng()[0].values())
    return [tensor.detach().clone() for tensor in found]


def evaluated(run: Run) -> tuple[float, float, bool, Any]:
    """An evaluation's loss, the next step's, whether all is as before, and its own metrics."""
    student = worlds.build(run)
    dp_rank = student.model.topology.dp_rank
    student.train_step(step_batch(0, run=run, dp_rank=dp_rank))
    batch = step_batch(1, run=run, dp_rank=dp_rank)
    before = everything(student)
    found = student.evaluate(batch)
    after = everything(student)
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return found.loss, student.train_step(batch).loss, same, found.metrics


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(pp=2), Layout(dp=2), Layout(tp=2, sequence_parallel=True)],
    ids=["one", "pp2", "dp2", "tp2-sp"],
)
def test_an_evaluation_is_the_forward_half_of_a_step(model: str, layout: Layout) -> None:
    run = Run(model_dir=model, layout=layout, micro_rows=2)
    found = run_ranks(evaluated, layout.world_size, run)
    for loss, trained, same, metrics in found:
        assert loss == trained and same
        assert metrics == found[0][3] and metrics["rows"] > 0
    (alone, *_), *_ = run_ranks(evaluated, 1, Run(model_dir=model, micro_rows=2))
    assert found[0][0] == pytest.approx(alone, rel=1e-5)


class Taught:
    """A companion, and the loss that writes its gradient whoever asks."""

    def __init__(self) -> None:
        self.gradient = torch.zeros(1)

    def step(self, lr: float) -> None:
        self.gradient.zero_()

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Any) -> None:
        pass


def left_behind(run: Run) -> tuple[float, int]:
    """A companion's gradient after an evaluation, and how often the loss added to it."""
    plain, taught = worlds.build(run), Taught()
    loss, calls = NextToken(plain.model), []

    def compute(*arguments: Any) -> LossOutput:
        taught.gradient += 1.0
        calls.append(1)
        return loss(*arguments)

    student = Student(
        model=plain.model,
        optimizer=plain.optimizer,
        scheduler=plain.scheduler,
        loss_function=compute,
        clip_grad=0.0,
        fused_head=False,
        companions=Companions(members={"a": taught}, lr=1.0),
    )
    student.evaluate(step_batch(0, run=run, dp_rank=0))
    return float(taught.gradient), len(calls)


def test_what_is_trained_beside_the_model_keeps_no_gradient(model: str) -> None:
    ((gradient, calls),) = run_ranks(left_behind, 1, Run(model_dir=model))
    assert calls == 2 and gradient == 0.0
