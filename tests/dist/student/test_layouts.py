"""Every layout computes what one process and transformers compute."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.dist.student import worlds
from tests.dist.student.worlds import FAMILIES, Layout, Run
from tests.helpers.dist import RankError, run_ranks

ONE = Layout()
LAYOUTS = {
    "tp2": Layout(tp=2),
    "tp2-sp": Layout(tp=2, sequence_parallel=True),
    "pp2": Layout(pp=2),
    "dp2": Layout(dp=2),
    "tp2-pp2": Layout(tp=2, pp=2),
}
SHARDED = {name: layout for name, layout in LAYOUTS.items() if layout.dp == 1}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {family: str(worlds.make_model(family, root / family)) for family in FAMILIES}


@cache
def reference(model_dir: str) -> tuple[list, dict]:
    return run_ranks(worlds.train, 1, Run(model_dir=model_dir))[0]


def relative(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


@pytest.mark.parametrize("name", ["one", "tp2-pp2"])
def test_scores_of_a_text_are_transformers_own_on_every_rank(
    models: dict[str, str], name: str
) -> None:
    from transformers import AutoModelForCausalLM

    model_dir, vocab_size = models[FAMILIES[0]], 61  # the tokenizer has fewer than the model
    layout = {"one": ONE, **SHARDED}[name]
    ids = np.random.default_rng(0).integers(0, vocab_size, 32)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    logits = model(torch.from_numpy(ids)[None]).logits.detach()[0, :-1, :vocab_size]
    wanted = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(ids[1:, None]))[:, 0]
    run = Run(model_dir=model_dir, layout=layout)
    for result in run_ranks(worlds.logprobs, layout.world_size, run, ids, vocab_size):
        assert result.shape == (31,) and result.dtype == np.float32
        np.testing.assert_allclose(result, wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["one", *SHARDED])
def test_logits_equal_transformers(models: dict[str, str], family: str, name: str) -> None:
    from transformers import AutoModelForCausalLM

    layout = {"one": ONE, **SHARDED}[name]
    tokens = np.random.default_rng(0).integers(0, 67, (3, 96))
    expected = AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float32)(
        torch.from_numpy(tokens)
    ).logits.detach()
    run = Run(model_dir=models[family], layout=layout)
    results = run_ranks(worlds.logits, layout.world_size, run, tokens)
    for result in results:
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=0.0)
    print(f"max difference {max(float((r - expected).abs().max()) for r in results):.1e}")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", ["one", *SHARDED])
def test_weights_round_trip_bitwise(
    models: dict[str, str], tmp_path: Path, family: str, name: str
) -> None:
    layout = {"one": ONE, **SHARDED}[name]
    out = tmp_path / "out"
    leads = run_ranks(
        worlds.round_trip, layout.world_size, Run(model_dir=models[family], layout=layout), str(out)
    )
    assert leads.count(True) == 1
    source = load_file(Path(models[family]) / "model.safetensors")
    saved = load_file(out / "model.safetensors")
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[key], source[key]) for key in source)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_training_agrees_with_one_process(models: dict[str, str], family: str, name: str) -> None:
    layout = LAYOUTS[name]
    run = Run(model_dir=models[family], layout=layout)
    expected, expected_weights = reference(models[family])
    ranks = run_ranks(worlds.train, layout.world_size, run)
    for results, _ in ranks:
        for got, want in zip(results, expected, strict=True):
            assert got.loss == pytest.approx(want.loss, rel=1e-4)
            assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
            assert got.lr == want.lr
            assert got.metrics == want.metrics
            assert not got.skipped
    weights = ranks[0][1]
    worst = max(relative(weights[key], expected_weights[key]) for key in expected_weights)
    step = ranks[0][0][0]
    print(
        f"loss {abs(step.loss / expected[0].loss - 1):.1e} "
        f"norm {abs(step.grad_norm / expected[0].grad_norm - 1):.1e} weights {worst:.1e}"
    )
    assert worst < 1e-4


@pytest.mark.parametrize("layout", [ONE, Layout(tp=2, pp=2), Layout(dp=2)], ids=str)
def test_micro_batches_do_not_change_the_step(models: dict[str, str], layout: Layout) -> None:
    expected, expected_weights = reference(models["llama"])
    run = Run(model_dir=models["llama"], layout=layout, micro_rows=1)
    results, weights = run_ranks(worlds.train, layout.world_size, run)[0]
    assert results[0].loss == pytest.approx(expected[0].loss, rel=1e-5)
    assert results[0].grad_norm == pytest.approx(expected[0].grad_norm, rel=1e-5)
    assert max(relative(weights[k], expected_weights[k]) for k in expected_weights) < 1e-4


def fail_on_rank_one(run: Run) -> None:
    topology = worlds.join(run.layout)
    if topology.rank == 1:
        raise ValueError("rank one is broken")
    torch.distributed.barrier()


def hang_on_rank_one(run: Run) -> None:
    topology = worlds.join(run.layout)
    while topology.rank == 1:
        time.sleep(0.1)


def test_a_hanging_rank_meets_its_deadline(models: dict[str, str]) -> None:
    run = Run(model_dir=models["llama"], layout=Layout(dp=2))
    with pytest.raises(TimeoutError, match=r"ranks \[1\] did not finish"):
        run_ranks(hang_on_rank_one, 2, run, timeout=10.0)


def test_a_failing_rank_reports_its_traceback(models: dict[str, str]) -> None:
    run = Run(model_dir=models["llama"], layout=Layout(dp=2))
    with pytest.raises(RankError, match="rank one is broken"):
        run_ranks(fail_on_rank_one, 2, run)
    assert run_ranks(worlds.train, 2, run)[0][0][0].loss > 0.0
