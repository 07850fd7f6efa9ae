"""The matrix of the parallel axes: loss and gradient of each cell are those of one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from mopd.student.attention import CausalAttention
from mopd.student.moe import BALANCING
from tests.dist.student import worlds
from tests.dist.student.worlds import Layout, Run
from tests.helpers.dist import run_ranks

TOLERANCE = 1e-4
CELLS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "one packed": (Layout(), {"packed": True}),
    "one recompute": (Layout(), {"student": {"recompute": {"granularity": "full"}}}),
    "one recompute selective": (Layout(), {"student": {"recompute": {"granularity": "selective"}}}),
    "tp2": (Layout(tp=2), {}),
    "tp2 packed": (Layout(tp=2), {"packed": True}),
    "tp2 sp": (Layout(tp=2, sequence_parallel=True), {}),
    "tp2 sp packed": (Layout(tp=2, sequence_parallel=True), {"packed": True}),
    "pp2": (Layout(pp=2), {}),
    "pp2 packed": (Layout(pp=2), {"packed": True, "micro_rows": 2}),
    "pp2 vp2": (Layout(pp=2, vp=2), {"micro_rows": 2}),
    "pp2 vp2 idle": (Layout(pp=2, vp=2), {"micro_rows": 8}),
    "pp2 vp2 packed": (Layout(pp=2, vp=2), {"micro_rows": 2, "packed": True}),
    "cp2": (Layout(cp=2), {}),
    "cp2 packed": (Layout(cp=2), {"packed": True}),
    "cp2 packed recompute": (
        Layout(cp=2),
        {"packed": True, "student": {"recompute": {"granularity": "full"}}},
    ),
    "dp2": (Layout(dp=2), {}),
    "dp2 packed": (Layout(dp=2), {"packed": True}),
    "tp2 sp pp2 packed": (Layout(tp=2, pp=2, sequence_parallel=True), {"packed": True}),
    "tp2 sp cp2 packed": (Layout(tp=2, cp=2, sequence_parallel=True), {"packed": True}),
    "tp2 cp2": (Layout(tp=2, cp=2), {}),
    "pp2 cp2 packed": (Layout(pp=2, cp=2), {"packed": True}),
    "dp2 cp2 packed": (Layout(dp=2, cp=2), {"packed": True}),
    "tp2 dp2": (Layout(tp=2, dp=2), {}),
    "tp2 pp2 vp2": (Layout(tp=2, pp=2, vp=2), {"micro_rows": 2}),
    "cp4 packed": (Layout(cp=4), {"packed": True}),
}
FULL = {"recompute": {"granularity": "full"}}
# How a step is cut into micro-batches matters to the load balancing.
UNBALANCED = {"moe_aux_loss_coeff": 0.0}
# Of a mixture of experts, whose expert group is over the replicas or context ranks.
EXPERT_CELLS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "one packed": (Layout(), {"packed": True}),
    "one recompute": (Layout(), {"student": FULL}),
    "ep2 dp2": (Layout(dp=2, ep=2), {}),
    "ep2 dp2 packed": (Layout(dp=2, ep=2), {"packed": True}),
    "ep2 dp2 uneven": (
        Layout(dp=2, ep=2),
        {"uneven": True, "micro_rows": 2, "student": UNBALANCED},
    ),
    "ep2 cp2 packed": (Layout(cp=2, ep=2), {"packed": True}),
    "tp2 sp packed": (Layout(tp=2, sequence_parallel=True), {"packed": True}),
    "cp2": (Layout(cp=2), {}),
    "pp2": (Layout(pp=2), {}),
    "pp2 vp2 packed": (
        Layout(pp=2, vp=2),
        {"packed": True, "micro_rows": 2, "student": UNBALANCED},
    ),
    "pp2 ep2 dp2 packed": (Layout(pp=2, dp=2, ep=2), {"packed": True}),
    "tp2 sp ep2 dp2": (Layout(tp=2, dp=2, ep=2, sequence_parallel=True), {}),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Untied and tied, without and with norms of queries and keys."""
    root = tmp_path_factory.mktemp("axes")
    return {
        family: str(worlds.make_model(family, root / family, num_hidden_layers=4))
        for family in ("llama3", "qwen3", "moe-deep")
    }


@cache
def reference(model_dir: str, balanced: bool = True) -> tuple[Any, dict[str, torch.Tensor]]:
    student = {} if balanced else UNBALANCED
    return run_ranks(worlds.gradients, 1, Run(model_dir=model_dir, student=student))[0]


def relative(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


# four ranks on two cores take their time: one family is enough for them
EVERY = [
    (cell, family)
    for cell, (layout, _) in CELLS.items()
    for family in ("llama3", "qwen3")
    if layout.world_size < 4 or family == "qwen3"
] + [(cell, "moe-deep") for cell in EXPERT_CELLS]


@pytest.mark.dist
@pytest.mark.parametrize(("cell", "family"), EVERY)
def test_loss_and_gradient_are_those_of_one_process(
    models: dict[str, str], cell: str, family: str
) -> None:
    layout, options = (EXPERT_CELLS if family == "moe-deep" else CELLS)[cell]
    balanced = options.get("student") != UNBALANCED
    expected, expected_gradient = reference(models[family], balanced)
    run = Run(model_dir=models[family], layout=layout, **options)
    ranks = run_ranks(worlds.gradients, layout.world_size, run)
    for result, _ in ranks:
        assert result.loss == pytest.approx(expected.loss, rel=TOLERANCE)
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=TOLERANCE)
        wanted = {name: v for name, v in expected.metrics.items() if balanced or name != BALANCING}
        got = {name: result.metrics[name] for name in wanted}
        assert got == pytest.approx(wanted, rel=TOLERANCE)
    gradient = ranks[0][1]
    assert gradient.keys() == expected_gradient.keys()
    worst = max(relative(gradient[name], expected_gradient[name]) for name in gradient)
    print(f"{cell} {family}: loss {abs(ranks[0][0].loss / expected.loss - 1):.1e} {worst:.1e}")
    assert worst < TOLERANCE


def forwards_of_attention(run: Run) -> int:
    """How often one step runs a layer's core attention."""
    student = worlds.build(run)
    count = 0

    def tick(*_: Any) -> None:
        nonlocal count
        count += 1

    for chunk in student.model.chunks:
        for module in chunk.modules():
            if isinstance(module, CausalAttention):
                module.register_forward_hook(tick)
    student.train_step(worlds.step_batch(0, run=run, dp_rank=0))
    return count


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputation_runs_the_attention_twice(models: dict[str, str], granularity: str) -> None:
    plain = Run(model_dir=models["qwen3"])
    again = Run(model_dir=models["qwen3"], student={"recompute": {"granularity": granularity}})
    (once,), (twice,) = (run_ranks(forwards_of_attention, 1, run) for run in (plain, again))
    assert twice == 2 * once > 0
