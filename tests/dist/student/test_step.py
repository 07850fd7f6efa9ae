"""The loss contract, the update, and steps that must not happen."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mopd.config.schema import OptimizerSection
from mopd.losses.base import LossOutput
from mopd.student.hf_io import iter_hf_weights
from mopd.student.step import StepResult, Student
from mopd.types import MicroBatch, StepBatch
from tests.dist.student import worlds
from tests.dist.student.worlds import Layout, NextToken, Run, step_batch
from tests.helpers.dist import RankError, run_ranks

PLAIN = OptimizerSection(lr=1e-2, lr_warmup_fraction=0.0, clip_grad=0.0)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(worlds.make_model("llama", tmp_path_factory.mktemp("step") / "llama"))


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(worlds.make_model("qwen3", tmp_path_factory.mktemp("step") / "qwen3"))


class TwoTeachers:
    """Weights 0.3 and 0.7 on even and odd response rows, each divided by its own global count."""

    def __init__(self, student_model: object) -> None:
        self._model = student_model

    def __call__(
        self, logits: torch.Tensor, micro_batch: MicroBatch, batch: StepBatch
    ) -> LossOutput:
        targets = torch.from_numpy(np.roll(micro_batch.tokens, -1, axis=1))
        total = logits[:0].sum()
        for (name, weight), mask in zip(LAMBDAS.items(), even_odd(micro_batch), strict=True):
            rows = torch.from_numpy(mask)
            losses = worlds.cross_entropy(logits[rows], targets[rows], self._model)
            total = total + losses.sum() * weight * batch.num_tokens / batch.denominators[name]
        return LossOutput(total=total, metrics={})


LAMBDAS = {"even": 0.3, "odd": 0.7}


def even_odd(micro_batch: MicroBatch) -> tuple[np.ndarray, np.ndarray]:
    is_even = np.arange(micro_batch.tokens.shape[1]) % 2 == 0
    return micro_batch.response_mask & is_even, micro_batch.response_mask & ~is_even


def global_counts(run: Run) -> dict[str, float]:
    sums = np.zeros(2)
    for dp_rank in range(run.layout.dp):
        for micro_batch in step_batch(0, run=run, dp_rank=dp_rank).micro_batches:
            sums += [mask.sum() for mask in even_odd(micro_batch)]
    return dict(zip(LAMBDAS, sums.tolist(), strict=True))


def gradients(run: Run) -> tuple[StepResult, dict[str, torch.Tensor]]:
    """The step's gradients under Hugging Face names, on the lead rank."""
    student = worlds.build(run, section=PLAIN)
    student = Student(
        model=student.model,
        optimizer=student.optimizer,
        scheduler=student.scheduler,
        loss_function=TwoTeachers(student.model),
        clip_grad=0.0,
        fused_head=True,
    )
    batch = step_batch(0, run=run, dp_rank=student.model.topology.dp_rank)
    result = student.train_step(replace(batch, denominators=global_counts(run)))
    with torch.no_grad():
        for _, parameter in student.model.named_parameters():
            parameter.copy_(parameter.main_grad)
    return result, {n: t.clone() for n, t in iter_hf_weights(student.model) if t is not None}


def transformers_gradients(model_dir: str) -> tuple[float, dict[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    batch = step_batch(0, run=Run(model_dir=model_dir, micro_rows=8), dp_rank=0).micro_batches[0]
    logits = model(torch.from_numpy(batch.tokens)).logits
    targets = torch.from_numpy(np.roll(batch.tokens, -1, axis=1))
    loss = torch.zeros(())
    for weight, mask in zip(LAMBDAS.values(), even_odd(batch), strict=True):
        rows = torch.from_numpy(mask)
        loss = loss + weight * torch.nn.functional.cross_entropy(logits[rows], targets[rows])
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp=2), Layout(pp=2), Layout(dp=2), Layout(tp=2, pp=2)],
    ids=["one", "tp2", "pp2", "dp2", "tp2-pp2"],
)
def test_gradient_is_that_of_the_weighted_means(
    request: pytest.FixtureRequest, family: str, layout: Layout
) -> None:
    model_dir = request.getfixturevalue(family)
    loss, expected = transformers_gradients(model_dir)
    run = Run(model_dir=model_dir, layout=layout, micro_rows=2)
    result, got = run_ranks(gradients, layout.world_size, run)[0]
    assert result.loss == pytest.approx(loss, rel=1e-5)
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    assert got.keys() == expected.keys()
    worst = max(float((got[n] - expected[n]).abs().max()) for n in expected) / norm
    print(f"gradient difference over its norm {worst:.1e}")
    assert worst < 1e-6


def first_step(run: Run, empty: int) -> StepResult:
    return worlds.build(run).train_step(step_batch(0, run=run, dp_rank=0, empty=empty))


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2)], ids=str)
def test_empty_micro_batches_change_nothing(llama: str, layout: Layout) -> None:
    run = Run(model_dir=llama, layout=layout)
    plain, filled = (run_ranks(first_step, layout.world_size, run, empty)[0] for empty in (0, 2))
    assert filled == plain


class BrokenOn:
    """The shared loss, not finite on one replica in one step."""

    def __init__(self, student: Student, *, dp_rank: int, step: int) -> None:
        self._loss = NextToken(student.model)
        self._is_mine = student.model.topology.dp_rank == dp_rank
        self._step = step

    def __call__(
        self, logits: torch.Tensor, micro_batch: MicroBatch, batch: StepBatch
    ) -> LossOutput:
        output = self._loss(logits, micro_batch, batch)
        if self._is_mine and batch.step == self._step:
            return LossOutput(total=output.total * float("nan"), metrics=output.metrics)
        return output


def train_with_a_broken_step(run: Run) -> tuple[list[StepResult], list[bool]]:
    plain = worlds.build(run)
    student = Student(
        model=plain.model,
        optimizer=plain.optimizer,
        scheduler=plain.scheduler,
        loss_function=BrokenOn(plain, dp_rank=run.layout.dp - 1, step=1),
        clip_grad=0.5,
        fused_head=True,
    )
    results, changed = [], []
    dp_rank = plain.model.topology.dp_rank
    for step in range(3):
        before = [p.detach().clone() for _, p in plain.model.named_parameters()]
        results.append(student.train_step(step_batch(step, run=run, dp_rank=dp_rank)))
        after = [p for _, p in plain.model.named_parameters()]
        changed.append(any(not torch.equal(b, a) for b, a in zip(before, after, strict=True)))
    return results, changed


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2), Layout(tp=2, pp=2)], ids=str)
def test_a_loss_that_is_not_finite_skips_the_update_everywhere(llama: str, layout: Layout) -> None:
    run = Run(model_dir=llama, layout=layout)
    for results, changed in run_ranks(train_with_a_broken_step, layout.world_size, run):
        assert [result.skipped for result in results] == [False, True, False]
        assert changed == [True, False, True]
        assert math.isfinite(results[2].loss)
        assert results[2].lr == results[1].lr  # the schedule waited


def padded(values: np.ndarray, width: int) -> np.ndarray:
    return np.pad(values, ((0, 0), (0, width - values.shape[1])))


def step_in_uneven_parts(run: Run, parts_shapes: list[tuple[int, int]]) -> StepResult:
    """The eight rows in micro-batches of these shapes, dealt to replicas in order."""
    student = worlds.build(run)
    whole = Run(model_dir=run.model_dir, micro_rows=8)
    batch = step_batch(0, run=whole, dp_rank=0)
    (rows,) = batch.micro_batches
    starts = [0, *np.cumsum([count for count, _ in parts_shapes])]
    parts = [
        MicroBatch(
            tokens=padded(rows.tokens[start : start + count], width),
            lengths=rows.lengths[start : start + count],
            response_mask=padded(rows.response_mask[start : start + count], width),
        )
        for start, (count, width) in zip(starts, parts_shapes, strict=False)
    ]
    mine = np.array_split(np.arange(len(parts)), run.layout.dp)[student.model.topology.dp_rank]
    return student.train_step(replace(batch, micro_batches=tuple(parts[i] for i in mine)))


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(dp=2), Layout(pp=2), Layout(tp=2, pp=2)], ids=str
)
def test_micro_batches_may_differ_in_shape_and_number(llama: str, layout: Layout) -> None:
    run = Run(model_dir=llama, layout=layout)
    expected = run_ranks(step_in_uneven_parts, 1, Run(model_dir=llama), [(8, 12)])[0]
    for result in run_ranks(
        step_in_uneven_parts, layout.world_size, run, [(4, 12), (3, 15), (1, 12)]
    ):
        assert result.loss == pytest.approx(expected.loss, rel=1e-6)
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
        assert result.metrics == expected.metrics


def wrong_token_count(run: Run) -> None:
    student = worlds.build(run)
    batch = step_batch(0, run=run, dp_rank=0)
    student.train_step(replace(batch, num_tokens=batch.num_tokens + 1))


def test_a_wrong_token_count_is_refused(llama: str) -> None:
    with pytest.raises(RankError, match="but the micro-batches hold"):
        run_ranks(wrong_token_count, 1, Run(model_dir=llama))


def learning_rates(run: Run, section: OptimizerSection, steps: int) -> tuple[list[float], dict]:
    student = worlds.build(run, section=section, total_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(float(student.optimizer.param_groups[0]["lr"]))
        student.scheduler.step(1)
    decayed = {
        len(parameter.shape)
        for group in student.optimizer.param_groups
        if group["weight_decay"] > 0.0
        for parameter in group["params"]
    }
    rest = {
        len(parameter.shape)
        for group in student.optimizer.param_groups
        if group["weight_decay"] == 0.0
        for parameter in group["params"]
    }
    return rates, {"decayed": decayed, "rest": rest}


def test_schedule_warms_up_holds_and_decays(llama: str) -> None:
    section = OptimizerSection(
        lr=1.0, min_lr=0.1, lr_warmup_fraction=0.2, lr_decay_fraction=0.4, weight_decay=0.1
    )
    rates, dims = run_ranks(learning_rates, 1, Run(model_dir=llama), section, 20)[0]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:12] == pytest.approx([1.0] * 8)
    assert rates[12:] == pytest.approx([1.0 - 0.9 * i / 9 for i in range(1, 9)])
    assert dims == {"decayed": {2}, "rest": {1}}


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.05), (1, 1.0), (3, 1.0), (7, 0.6)])
def test_odd_lengths_of_runs(llama: str, steps: int, warmup: float) -> None:
    section = OptimizerSection(lr=1.0, lr_warmup_fraction=warmup)
    rates, _ = run_ranks(learning_rates, 1, Run(model_dir=llama), section, steps)[0]
    assert all(0.0 < rate <= 1.0 for rate in rates)


def test_bfloat16_follows_float32(tmp_path: Path) -> None:
    model_dir = str(worlds.make_model("qwen3", tmp_path / "model", dtype=torch.bfloat16))
    expected, _ = run_ranks(worlds.train, 1, Run(model_dir=model_dir))[0]
    for layout in (Layout(), Layout(tp=2, pp=2)):
        run = Run(model_dir=model_dir, layout=layout, student={"dtype": "bfloat16"})
        results, weights = run_ranks(worlds.train, layout.world_size, run)[0]
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
        for got, want in zip(results, expected, strict=True):
            assert got.loss == pytest.approx(want.loss, rel=2e-2)
            assert got.grad_norm == pytest.approx(want.grad_norm, rel=5e-2)
