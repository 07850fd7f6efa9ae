"""Weights that do not learn stay as they are, bit by bit; the others learn as ever."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mopd.student.step import StepResult
from tests.dist.student import test_fused_step as fused_step
from tests.dist.student import worlds
from tests.dist.student.worlds import Layout, Run, step_batch
from tests.helpers.dist import RankError, run_ranks

pytestmark = pytest.mark.dist

EMBEDDING = r"model\.embed_tokens\.weight"
FIRST_LAYER = r"model\.layers\.0\..*"
NORMS = r".*norm\.weight"
LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tp=2),
    "tp2-sp": Layout(tp=2, sequence_parallel=True),
    "pp2": Layout(pp=2),
    "dp2": Layout(dp=2),
}
# In the first the last stage has a copy of the embedding, in the second a whole stage is frozen.
CASES = {
    "qwen3": (EMBEDDING, NORMS, r".*\.mlp\.down_proj\.weight"),
    "llama": (EMBEDDING, FIRST_LAYER, r"lm_head\.weight"),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("freeze")
    return {family: str(worlds.make_model(family, root / family)) for family in CASES}


def frozen_names(patterns: tuple[str, ...], source: dict[str, torch.Tensor]) -> set[str]:
    import re

    return {name for name in source if any(re.fullmatch(p, name) for p in patterns)}


def train(run: Run) -> tuple[list[StepResult], dict[str, torch.Tensor], list[str]]:
    """Steps, the weights, and this rank's parameters that moved although they are frozen."""
    student = worlds.build(run)
    dp_rank = student.model.topology.dp_rank
    parameters = dict(student.model.named_parameters())
    before = {n: p.detach().clone() for n, p in parameters.items() if not p.requires_grad}
    batches = [step_batch(step, run=run, dp_rank=dp_rank) for step in range(run.steps)]
    results = [student.train_step(batch) for batch in batches]
    moved = [name for name, value in before.items() if not torch.equal(parameters[name], value)]
    return results, worlds.full_weights(student), moved


def norm_of_the_others(model_dir: str, frozen: set[str]) -> float:
    """Of transformers' own gradient of the first step, over what is not frozen."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    batch = step_batch(0, run=Run(model_dir=model_dir, micro_rows=8), dp_rank=0).micro_batches[0]
    rows = torch.from_numpy(batch.response_mask)
    targets = torch.from_numpy(np.roll(batch.tokens, -1, axis=1))[rows]
    logits = model(torch.from_numpy(batch.tokens)).logits[rows]
    torch.nn.functional.cross_entropy(logits, targets).backward()
    squares = [float(p.grad.square().sum()) for n, p in model.named_parameters() if n not in frozen]
    return math.sqrt(sum(squares))


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_frozen_weights_do_not_move(models: dict[str, str], family: str, name: str) -> None:
    source = load_file(Path(models[family]) / "model.safetensors")
    frozen = frozen_names(CASES[family], source)
    keys: dict[str, Any] = {"freeze": CASES[family]}
    expected, one, _ = run_ranks(train, 1, Run(model_dir=models[family], student=keys))[0]
    norm = norm_of_the_others(models[family], frozen)
    run = Run(model_dir=models[family], layout=LAYOUTS[name], student=keys)
    for results, _, moved in (ranks := run_ranks(train, run.layout.world_size, run)):
        assert moved == []
        assert results[0].grad_norm == pytest.approx(norm, rel=1e-5)
        for got, want in zip(results, expected, strict=True):
            assert got.loss == pytest.approx(want.loss, rel=1e-4)
            assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
    weights = ranks[0][1]
    for key, weight in weights.items():
        assert torch.equal(weight, source[key]) == (key in frozen), key
        assert fused_step.relative(weight, one[key]) < 1e-4


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.experts\.0\..*",  # its place on its rank is that of another one on another rank
        r"(?!.*\.experts\.).*",  # nothing dense learns
    ],
)
def test_an_expert_is_frozen_where_it_is(tmp_path: Path, pattern: str) -> None:
    model_dir = str(worlds.make_model("moe", tmp_path / "moe"))
    source = load_file(Path(model_dir) / "model.safetensors")
    patterns = (pattern,)
    frozen, keys = frozen_names(patterns, source), {"freeze": patterns}
    expected, one, _ = run_ranks(train, 1, Run(model_dir=model_dir, student=keys))[0]
    run = Run(model_dir=model_dir, layout=Layout(dp=2, ep=2), student=keys)
    results, weights, moved = run_ranks(train, 2, run)[0]
    assert moved == [] and frozen
    for got, want in zip(results, expected, strict=True):
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
    for key, weight in weights.items():
        assert torch.equal(weight, source[key]) == (key in frozen), key
        assert fused_step.relative(weight, one[key]) < 1e-4


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2)], ids=str)
def test_recomputed_layers_behind_a_frozen_embedding(
    models: dict[str, str], layout: Layout
) -> None:
    run = Run(model_dir=models["llama"], layout=layout, student={"freeze": (EMBEDDING,)})
    keys = {"freeze": (EMBEDDING,), "recompute": {"granularity": "full"}}
    plain, again = (
        run_ranks(train, layout.world_size, r)[0] for r in (run, replace(run, student=keys))
    )
    for got, want in zip(again[0], plain[0], strict=True):
        assert got.loss == pytest.approx(want.loss, rel=1e-6)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-6)
    assert again[2] == []


@pytest.mark.parametrize(
    ("family", "frozen"), [("llama", r"lm_head\.weight"), ("qwen3", EMBEDDING)]
)
def test_the_head_and_its_loss_may_be_one(models: dict[str, str], family: str, frozen: str) -> None:
    run = Run(model_dir=models[family], layout=Layout(tp=2), student={"freeze": (frozen,)})
    fused, plain = (run_ranks(fused_step.train, 2, run, way)[0] for way in (True, False))
    for got, want in zip(fused[0], plain[0], strict=True):
        assert got.loss == pytest.approx(want.loss, rel=1e-6)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-5)
    assert max(fused_step.relative(fused[1][key], plain[1][key]) for key in plain[1]) < 1e-5


def test_a_wrong_pattern_is_told_on_every_rank(models: dict[str, str]) -> None:
    run = Run(model_dir=models["llama"], layout=Layout(pp=2), student={"freeze": ("q_proj",)})
    with pytest.raises(RankError) as error:
        run_ranks(train, 2, run)
    assert str(error.value).count("`q_proj` matches no weight of student.model") == 2
