"""A mixture of experts in every layout: its logits, its weights, its gradients, its balance."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mopd.config.schema import OptimizerSection
from mopd.losses.base import LossOutput
from mopd.serving.hf_experts import one_by_one
from mopd.student.hf_io import iter_hf_weights
from mopd.student.step import StepResult, Student
from mopd.types import MicroBatch, StepBatch
from tests.dist.student import worlds
from tests.dist.student.worlds import Layout, Run, step_batch
from tests.helpers.dist import run_ranks

LAYOUTS = {
    "one": Layout(),
    "ep2": Layout(dp=2, ep=2),
    "tp2": Layout(tp=2, sequence_parallel=True),
    "pp2": Layout(pp=2),
    "tp2-ep2": Layout(tp=2, dp=2, ep=2, sequence_parallel=True),
    "pp2-ep2": Layout(pp=2, dp=2, ep=2),
    "tp2-pp2": Layout(tp=2, pp=2, sequence_parallel=True),
}
VARIANTS = ("moe", "moe-raw", "moe-mixed", "moe-deep")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("moe")
    return {name: str(worlds.make_model(name, root / name)) for name in VARIANTS}


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        *(("moe", layout) for layout in LAYOUTS.values()),
        *(("moe-raw", LAYOUTS[name]) for name in ("one", "tp2-ep2")),
        *(("moe-mixed", LAYOUTS[name]) for name in ("pp2", "tp2-ep2")),
        ("moe-deep", LAYOUTS["pp2-ep2"]),
    ],
    ids=str,
)
def test_logits_equal_transformers(models: dict[str, str], variant: str, layout: Layout) -> None:
    from transformers import AutoModelForCausalLM

    tokens = np.random.default_rng(0).integers(0, 67, (2, 48))
    model = AutoModelForCausalLM.from_pretrained(models[variant], dtype=torch.float32)
    expected = model(torch.from_numpy(tokens)).logits.detach()
    run = Run(model_dir=models[variant], layout=layout)
    for result in run_ranks(worlds.logits, layout.world_size, run, tokens):
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=0.0)


def route(run: Run, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    router = worlds.build(run).model.chunks[0].decoder.layers[0].mlp.router
    return (*router.routing(router.gating(hidden)), router.weight.detach())


@pytest.mark.parametrize("variant", ["moe", "moe-raw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_router_chooses_as_transformers_does(
    models: dict[str, str], variant: str, dtype: str
) -> None:
    from transformers import AutoConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    hidden = torch.randn(512, 1, 64, dtype=getattr(torch, dtype))
    run = Run(model_dir=models[variant], student={"dtype": dtype})
    probs, routing_map, weight = run_ranks(route, 1, run, hidden)[0]
    theirs = Qwen3MoeTopKRouter(AutoConfig.from_pretrained(models[variant])).to(weight.dtype)
    theirs.load_state_dict({"weight": weight})
    _, weights, chosen = theirs(hidden)
    assert torch.equal(routing_map.nonzero()[:, 1].view(-1, 2), chosen.sort(1).values)
    expected = torch.zeros_like(probs).scatter(1, chosen, weights.detach().float())
    # theirs are rounded to the model's type, ours stay in float32
    assert torch.equal(probs.to(weight.dtype).float(), expected)


def round_trip(run: Run, out_dir: str) -> dict[str, torch.Tensor]:
    """What this rank is handed; replica 0 writes it."""
    from mopd.student.hf_export import save_hf

    student = worlds.build(run)
    save_hf(student.model, out_dir, source_dir=run.model_dir)
    return worlds.full_weights(student)


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        *(("moe", layout) for layout in LAYOUTS.values()),
        ("moe-mixed", LAYOUTS["tp2-ep2"]),
        ("moe-mixed", LAYOUTS["pp2-ep2"]),
        ("moe-deep", Layout(pp=2, vp=2)),
    ],
    ids=str,
)
def test_weights_round_trip_bitwise(
    models: dict[str, str], tmp_path: Path, variant: str, layout: Layout
) -> None:
    run = Run(model_dir=models[variant], layout=layout)
    ranks = run_ranks(round_trip, layout.world_size, run, str(tmp_path / "out"))
    source = load_file(Path(models[variant]) / "model.safetensors")
    leads = [weights for weights in ranks if weights]
    assert len(leads) == layout.dp  # every replica's sampler gets every expert
    for saved in (load_file(tmp_path / "out" / "model.safetensors"), *leads):
        assert saved.keys() == source.keys()
        assert all(torch.equal(saved[key], source[key]) for key in source)


@pytest.mark.parametrize("name", ["one", "tp2-ep2"])
def test_experts_in_one_tensor_are_read_too(
    models: dict[str, str], tmp_path: Path, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models["moe"])
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any(
        key.endswith("experts.gate_up_proj")
        for key in load_file(tmp_path / "fused" / "model.safetensors")
    )
    run = Run(model_dir=str(tmp_path / "fused"), layout=LAYOUTS[name])
    found = run_ranks(round_trip, run.layout.world_size, run, str(tmp_path / "out"))[0]
    source = load_file(Path(models["moe"]) / "model.safetensors")
    assert found.keys() == source.keys()
    assert all(torch.equal(found[key], source[key]) for key in source)


@cache
def one_process(model_dir: str, micro_rows: int) -> tuple[list[StepResult], dict]:
    return run_ranks(worlds.train, 1, Run(model_dir=model_dir, micro_rows=micro_rows))[0]


@pytest.mark.parametrize(
    ("variant", "layout", "micro_rows"),
    [
        *(("moe", layout, 4) for name, layout in LAYOUTS.items() if name != "one"),
        ("moe", LAYOUTS["ep2"], 2),
        ("moe-raw", LAYOUTS["ep2"], 4),
        ("moe-mixed", LAYOUTS["pp2-ep2"], 4),  # no expert at all in the first stage
    ],
    ids=str,
)
def test_training_agrees_with_one_process(
    models: dict[str, str], variant: str, layout: Layout, micro_rows: int
) -> None:
    expected, expected_weights = one_process(models[variant], micro_rows)
    run = Run(model_dir=models[variant], layout=layout, micro_rows=micro_rows)
    ranks = run_ranks(worlds.train, layout.world_size, run)
    for results, _ in ranks:
        for got, want in zip(results, expected, strict=True):
            assert got.loss == pytest.approx(want.loss, rel=1e-4)
            assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
            assert got.metrics == pytest.approx(want.metrics, rel=1e-4)
            assert not got.skipped
            assert 0.9 < got.metrics["moe/load_balancing"] < 1.5  # of one step, not of all so far
    assert expected[0].grad_norm > 0.5  # so that clipping is part of it
    weights = ranks[0][1]
    worst = max(
        float((weights[k] - w).abs().max() / w.abs().max()) for k, w in expected_weights.items()
    )
    print(f"weights {worst:.1e}")
    assert worst < 1e-4


# --- the load-balancing loss -------------------------------------------------------------------

COEFFICIENT = 0.02  # worlds.make_moe
PLAIN = OptimizerSection(lr=1e-2, lr_warmup_fraction=0.0, clip_grad=0.0)


def nothing(logits: torch.Tensor, micro_batch: MicroBatch, batch: StepBatch) -> LossOutput:
    """A distillation loss of zero: what is left of the gradient is the load balancing's."""
    return LossOutput(total=logits.sum() * 0.0, metrics={})


def batch_of(
    run: Run, dp_rank: int, *, width: int = 12, response: float = 0.5, empty: int = 0
) -> StepBatch:
    """The shared eight rows with ``response`` of their tokens in the mask, padded to ``width``."""
    batch = step_batch(0, run=run, dp_rank=dp_rank, empty=empty)

    def wide(micro: MicroBatch) -> MicroBatch:
        extra = ((0, 0), (0, width - micro.tokens.shape[1]))
        mask = np.arange(width) >= ((1 - response) * micro.lengths)[:, None]
        return replace(
            micro,
            tokens=np.pad(micro.tokens, extra, constant_values=1),
            response_mask=mask & (np.arange(width) < micro.lengths[:, None]),
        )

    return replace(batch, micro_batches=tuple(map(wide, batch.micro_batches)))


def balancing_gradient(
    run: Run, options: dict[str, float]
) -> tuple[StepResult, dict[str, torch.Tensor]]:
    student = worlds.build(run, section=PLAIN)
    student = Student(
        model=student.model,
        optimizer=student.optimizer,
        scheduler=student.scheduler,
        loss_function=nothing,
        clip_grad=0.0,
        fused_head=False,
    )
    batch = batch_of(run, student.model.topology.dp_rank, **options)  # type: ignore[arg-type]
    result = student.train_step(batch)
    with torch.no_grad():
        for _, parameter in student.model.named_parameters():
            parameter.copy_(parameter.main_grad)
    return result, {n: t.clone() for n, t in iter_hf_weights(student.model) if t is not None}


@cache
def defined(
    model_dir: str, micro_rows: int
) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """L and the gradient of coefficient * sum_j T_j * L_j / sum_j T_j, in float64, from
    transformers' model and the formula."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float64, experts_implementation="eager"
    )
    batch = batch_of(Run(model_dir=model_dir, micro_rows=micro_rows), 0)
    total, layers = torch.zeros((), dtype=torch.float64), model.config.num_hidden_layers
    for micro in batch.micro_batches:
        real = torch.from_numpy(np.arange(micro.tokens.shape[1]) < micro.lengths[:, None])
        tokens = torch.from_numpy(micro.tokens)
        for logits in model(tokens, output_router_logits=True).router_logits:
            scores = logits.reshape(*tokens.shape, -1)[real].softmax(-1)
            chosen = torch.zeros_like(scores).scatter(1, scores.topk(2).indices, 1.0)
            share, mean = chosen.sum(0) / (2 * len(scores)), scores.mean(0)
            total = total + len(scores) * scores.shape[1] * (share * mean).sum()
    total = total / batch.num_tokens
    (COEFFICIENT * total).backward()
    gradient = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return float(total.detach()) / layers, gradient, dict(model.named_parameters())


@pytest.mark.parametrize(
    ("name", "micro_rows"), [*((name, 2) for name in LAYOUTS), ("one", 4), ("tp2-ep2", 4)]
)
def test_the_gradient_is_that_of_the_definition(
    models: dict[str, str], name: str, micro_rows: int
) -> None:
    balance, expected, parameters = defined(models["moe"], micro_rows)
    run = Run(model_dir=models["moe"], layout=LAYOUTS[name], micro_rows=micro_rows)
    ranks = run_ranks(balancing_gradient, run.layout.world_size, run, {})
    result, got = ranks[0]
    for each, _ in ranks:
        assert each.loss == 0.0
        assert each.metrics["moe/load_balancing"] == pytest.approx(balance, rel=1e-4)
        assert each.metrics["moe/max_load"] >= 1.0
    whole = {n: expected.get(n, torch.zeros_like(p)) for n, p in parameters.items()}
    whole = dict(one_by_one(whole.items()))
    norm = float(torch.stack([g.square().sum() for g in whole.values()]).sum().sqrt())
    assert result.grad_norm == pytest.approx(norm, rel=1e-4)
    routers = [n for n in got if n.endswith("mlp.gate.weight")]
    assert len(routers) == 2 and all(float(got[n].abs().max()) > 1e-5 for n in routers)
    for n, gradient in got.items():
        if n != "lm_head.weight":  # tied
            torch.testing.assert_close(gradient.double(), whole[n], atol=1e-4 * norm, rtol=1e-4)


@pytest.mark.parametrize("name", ["one", "tp2-ep2"])
def test_the_share_of_the_response_does_not_matter(models: dict[str, str], name: str) -> None:
    run = Run(model_dir=models["moe"], layout=LAYOUTS[name], micro_rows=2)
    (few, few_gradient), (many, many_gradient) = (
        run_ranks(balancing_gradient, run.layout.world_size, run, {"response": share})[0]
        for share in (0.1, 0.9)
    )
    assert few.metrics == many.metrics
    assert few.grad_norm == many.grad_norm > 0.0
    assert all(torch.equal(few_gradient[n], many_gradient[n]) for n in many_gradient)


@pytest.mark.parametrize("name", ["one", "tp2-ep2", "pp2-ep2", "tp2-pp2"])
def test_padding_does_not_count(models: dict[str, str], name: str) -> None:
    run = Run(model_dir=models["moe"], layout=LAYOUTS[name], micro_rows=2)
    (plain, plain_gradient), (padded, padded_gradient) = (
        run_ranks(balancing_gradient, run.layout.world_size, run, options)[0]
        for options in ({}, {"width": 24, "empty": 1})
    )
    assert padded.metrics == pytest.approx(plain.metrics, rel=1e-6)
    assert padded.grad_norm == pytest.approx(plain.grad_norm, rel=1e-5)
    for n, gradient in plain_gradient.items():
        torch.testing.assert_close(padded_gradient[n], gradient, atol=1e-5, rtol=1e-4)


def test_the_recipe_may_change_or_drop_the_loss(models: dict[str, str]) -> None:
    run = Run(model_dir=models["moe"], micro_rows=2)
    norms, balances = [], []
    for coefficient in (COEFFICIENT, 2 * COEFFICIENT, 0.0):
        changed = replace(run, student={"moe_aux_loss_coeff": coefficient})
        result, _ = run_ranks(balancing_gradient, 1, changed, {})[0]
        norms.append(result.grad_norm)
        balances.append(result.metrics["moe/load_balancing"])
    assert norms == pytest.approx([norms[0], 2 * norms[0], 0.0], rel=1e-5)
    assert balances == [balances[0]] * 3  # still measured


def test_recomputation_counts_every_token_once(models: dict[str, str]) -> None:
    run = Run(model_dir=models["moe"], micro_rows=2)
    again = replace(run, student={"recompute": {"granularity": "full"}})
    (plain, _), (recomputed, _) = (
        run_ranks(balancing_gradient, 1, each, {})[0] for each in (run, again)
    )
    assert recomputed.metrics == plain.metrics
    assert recomputed.grad_norm == pytest.approx(plain.grad_norm, rel=1e-6)
