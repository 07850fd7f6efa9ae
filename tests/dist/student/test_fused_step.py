"""A student that hands hidden states to the head trains as one that hands logits to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mopd.config.schema import OptimizerSection
from mopd.losses.base import LossOutput
from mopd.losses.divergence import Divergence
from mopd.losses.head import DistillationHead, TeacherTerm
from mopd.losses.kl import KlLoss
from mopd.losses.vocab import VocabShard
from mopd.student.step import StepResult, Student
from mopd.types import MicroBatch, StepBatch, TeacherRows
from tests.dist.student import worlds
from tests.dist.student.worlds import Layout, Run, step_batch
from tests.helpers.dist import run_ranks
from tests.helpers.losses import make_rows

LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tp=2),
    "tp2-sp": Layout(tp=2, sequence_parallel=True),
    "pp2": Layout(pp=2),
    "tp2-pp2": Layout(tp=2, pp=2),
    "dp2": Layout(dp=2),
}
# A large epsilon: Adam's first steps are otherwise signs, which hide the size of a gradient.
SECTION = OptimizerSection(lr=1e-1, lr_warmup_fraction=0.0, adam_eps=1e-2, clip_grad=0.5)
VOCAB, LISTED = 67, 5
JSD = Divergence(kind="jsd", beta=0.5)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """llama has an output weight of its own, qwen3 the embedding's."""
    root = tmp_path_factory.mktemp("fused")
    return {family: str(worlds.make_model(family, root / family)) for family in ("llama", "qwen3")}


def teacher(micro: MicroBatch) -> TeacherRows:
    """Random lists on the response rows, a function of the tokens alone."""
    generator = np.random.default_rng(int(micro.tokens.sum()))
    position = np.flatnonzero(micro.response_mask)
    ids = np.stack([generator.choice(VOCAB, LISTED, replace=False) for _ in position])
    probs = generator.dirichlet(np.ones(LISTED + 1), len(position))[:, :LISTED]
    return make_rows(position.tolist(), ids, probs)


def batch_of(step: int, *, run: Run, dp_rank: int) -> StepBatch:
    """The shared batch with a teacher, and one micro-batch without any payload."""
    batch = step_batch(step, run=run, dp_rank=dp_rank, empty=1)
    micro_batches = tuple(
        replace(micro, rows={"teacher": teacher(micro)}) if micro.response_mask.any() else micro
        for micro in batch.micro_batches
    )
    assert not micro_batches[-1].rows
    return replace(batch, micro_batches=micro_batches)


class Counting:
    """A head that remembers which way it was called."""

    def __init__(self, head: DistillationHead) -> None:
        self._head = head
        self.ways: set[str] = set()

    def __call__(self, logits: torch.Tensor, micro: MicroBatch, batch: StepBatch) -> LossOutput:
        self.ways.add("logits")
        return self._head(logits, micro, batch)

    def from_hidden(
        self, hidden: torch.Tensor, weight: torch.Tensor, micro: MicroBatch, batch: StepBatch
    ) -> LossOutput:
        assert hidden.shape[:2] == micro.tokens.shape
        self.ways.add("hidden")
        return self._head.from_hidden(hidden, weight, micro, batch)


def build(run: Run, fused: bool) -> tuple[Student, Counting]:
    plain = worlds.build(run, section=SECTION)
    model, topology = plain.model, plain.model.topology
    size = model.padded_vocab_size // topology.tp_size
    head = DistillationHead(
        terms={
            "teacher": TeacherTerm(
                loss=KlLoss(divergence=JSD, temperature=1.0, value_scale=1.0),
                weight=1.0,
                projection=None,
            )
        },
        shard=VocabShard(
            start=topology.tp_rank * size,
            size=size,
            vocab_size=model.vocab_size,
            group=topology.tp_group,
        ),
    )
    counting = Counting(head)
    student = Student(
        model=model,
        optimizer=plain.optimizer,
        scheduler=plain.scheduler,
        loss_function=counting,
        clip_grad=SECTION.clip_grad,
        fused_head=fused,
    )
    return student, counting


Outcome = tuple[list[StepResult], dict[str, torch.Tensor], torch.Tensor, set[str]]


def train(run: Run, fused: bool) -> Outcome:
    """Results of the steps, the weights on the lead, logits afterwards, what the head saw."""
    student, head = build(run, fused)
    dp_rank = student.model.topology.dp_rank
    results = [
        student.train_step(batch_of(step, run=run, dp_rank=dp_rank)) for step in range(run.steps)
    ]
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 10))
    logits = student.forward_logits(tokens)
    return results, worlds.full_weights(student), logits, head.ways


def relative(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.float() - right.float()).abs().max() / right.float().abs().max())


@pytest.mark.dist
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_fused_and_unfused_train_alike(models: dict[str, str], family: str, name: str) -> None:
    layout = LAYOUTS[name]
    run = Run(model_dir=models[family], layout=layout)
    fused, plain = (run_ranks(train, layout.world_size, run, way) for way in (True, False))
    assert set().union(*(ways for *_, ways in fused)) == {"hidden"}
    assert set().union(*(ways for *_, ways in plain)) == {"logits"}
    for (ours, _, logits, _), (theirs, _, other, _) in zip(fused, plain, strict=True):
        assert logits.shape == (2, 10, VOCAB)  # evaluation still gets logits
        assert relative(logits, other) < 1e-5
        for got, want in zip(ours, theirs, strict=True):
            assert got.loss == pytest.approx(want.loss, rel=1e-6)
            assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-6)
            assert got.metrics == pytest.approx(want.metrics, rel=1e-6)
    weights, expected = fused[0][1], plain[0][1]
    assert weights.keys() == expected.keys()
    assert max(relative(weights[key], expected[key]) for key in expected) < 1e-5


@pytest.mark.dist
@pytest.mark.parametrize("name", ["tp2", "pp2"])
def test_layouts_train_alike(models: dict[str, str], name: str) -> None:
    """The gradient of the hidden states is whole: a lost sum would be the same in both ways."""
    layout = LAYOUTS[name]
    for family in models:
        one = run_ranks(train, 1, Run(model_dir=models[family]), True)[0]
        other = run_ranks(
            train, layout.world_size, Run(model_dir=models[family], layout=layout), True
        )[0]
        for got, want in zip(other[0], one[0], strict=True):
            assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-5)
        assert max(relative(other[1][key], one[1][key]) for key in one[1]) < 1e-4


def test_bfloat16(tmp_path: Path) -> None:
    model_dir = str(worlds.make_model("qwen3", tmp_path / "model", dtype=torch.bfloat16))
    for layout in (Layout(), Layout(tp=2)):
        run = Run(model_dir=model_dir, layout=layout, student={"dtype": "bfloat16"})
        fused, plain = (run_ranks(train, layout.world_size, run, way)[0] for way in (True, False))
        assert {weight.dtype for weight in fused[1].values()} == {torch.bfloat16}
        for got, want in zip(fused[0], plain[0], strict=True):
            assert got.loss == pytest.approx(want.loss, rel=1e-2)
            assert got.grad_norm == pytest.approx(want.grad_norm, rel=2e-2)
