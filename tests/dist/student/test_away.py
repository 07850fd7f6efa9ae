"""The student's optimizer state and gradients leave the device and come back, bit by bit."""

from __future__ import annotations

import math

import pytest
import torch

from mopd.student.away import StudentState
from tests.dist.student import worlds
from tests.dist.student.worlds import Layout, Run, step_batch
from tests.helpers.dist import run_ranks


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(worlds.make_model("llama", tmp_path_factory.mktemp("away") / "llama"))


def trained(
    run: Run, sharded: bool, leaves: bool
) -> tuple[list[float], list[torch.Tensor], list[int]]:
    """Losses and norms of four steps, weights, bytes on the device before and after leaving."""
    section = worlds.OptimizerSection(
        lr=1e-2, lr_warmup_fraction=0.0, use_distributed_optimizer=sharded
    )
    student = worlds.build(run, section=section)
    state, numbers, sizes = StudentState(student.model, student.optimizer), [], []
    for step in range(4):
        if leaves:
            sizes.append(state.num_bytes)
            state.away()
            state.away()
            sizes.append(state.num_bytes)
            state.back()
            state.back()
        batch = step_batch(step, run=run, dp_rank=student.model.topology.dp_rank)
        result = student.train_step(batch)
        numbers += [result.loss, result.grad_norm]
    weights = [p.detach().clone() for chunk in student.model.chunks for p in chunk.parameters()]
    return numbers, weights, sizes


@pytest.mark.parametrize(
    ("layout", "sharded", "dtype"),
    [
        (Layout(), False, "float32"),
        (Layout(), True, "bfloat16"),
        (Layout(dp=2), True, "float32"),
        (Layout(dp=2), False, "bfloat16"),
    ],
)
def test_training_goes_on_as_if_nothing_had_left(
    llama: str, layout: Layout, sharded: bool, dtype: str
) -> None:
    run = Run(model_dir=llama, layout=layout, student={"dtype": dtype})
    stayed = run_ranks(trained, layout.world_size, run, sharded, False)
    left = run_ranks(trained, layout.world_size, run, sharded, True)
    for (numbers, weights, _), (same_numbers, same_weights, sizes) in zip(
        stayed, left, strict=True
    ):
        assert numbers == same_numbers and all(map(math.isfinite, numbers))
        assert all(map(torch.equal, weights, same_weights))
        assert min(sizes[::2]) > 0 and set(sizes[1::2]) == {0}
        assert sizes[2] > sizes[0]  # the moments are made in the first step
