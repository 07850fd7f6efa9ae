"""Adapters against PEFT: their gradients, their sum with the base, their files."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mopd.config.adapter import check_adapter
from mopd.config.schema import LoraSection, OptimizerSection
from mopd.student import adapter_io
from mopd.student.hf_io import iter_hf_weights
from mopd.student.lora import adapter_off
from mopd.student.step import StepResult
from tests.dist.student import test_fused_step as fused_step
from tests.dist.student import worlds
from tests.dist.student.worlds import Layout, Run, step_batch
from tests.helpers.dist import RankError, run_ranks

pytestmark = pytest.mark.dist

ALL = LoraSection().target_modules
RANK, ALPHA = 4, 6.0
LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tp=2),
    "tp2-sp": Layout(tp=2, sequence_parallel=True),
    "pp2": Layout(pp=2),
    "tp2-pp2": Layout(tp=2, pp=2),
}
PLAIN = OptimizerSection(lr=1e-2, lr_warmup_fraction=0.0, clip_grad=0.0)
TOKENS = np.random.default_rng(0).integers(0, 67, (2, 10))

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("lora")
    return {name: str(worlds.make_model(name, root / name)) for name in ("llama", "qwen3")}


@pytest.fixture(scope="session")
def trained(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Adapters of ``models`` that PEFT wrote, with a B that is not zero."""
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(model, ALL, root / name) for name, model in models.items()}


def make_adapter(model_dir: str, targets: tuple[str, ...], out: Path) -> str:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(targets), task_type="CAUSAL_LM"
    )
    model = get_peft_model(transformers_model(model_dir), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(out)
    return str(out)


def transformers_model(model_dir: str, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)


def peft_logits(model_dir: str, adapter: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    from peft import PeftModel

    base = transformers_model(model_dir, dtype)
    model = PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False)
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits


def lora_run(model_dir: str, layout: Layout, *, path: str | None = None, **more: Any) -> Run:
    lora = {"rank": RANK, "alpha": ALPHA, "path": path}
    lora |= {"target_modules": more.pop("targets", ALL)}
    return Run(model_dir=model_dir, layout=layout, student={"lora": lora, **more})


def relative(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.float() - right.float()).abs().max() / right.float().abs().max())


def gathered(student: Any) -> Tensors:
    """The adapter under PEFT's names, on the lead rank."""
    found = adapter_io.iter_adapter(student.model)
    return {name: tensor.clone() for name, tensor in found if tensor is not None}


def gradients(run: Run) -> tuple[StepResult, Tensors]:
    student = worlds.build(run, section=PLAIN)
    dp_rank = student.model.topology.dp_rank
    result = student.train_step(step_batch(0, run=run, dp_rank=dp_rank))
    with torch.no_grad():
        for _, parameter in student.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.main_grad)
    return result, gathered(student)


def peft_gradients(model_dir: str, adapter: str) -> tuple[float, Tensors]:
    from peft import PeftModel

    model = PeftModel.from_pretrained(transformers_model(model_dir), adapter, is_trainable=True)
    batch = step_batch(0, run=Run(model_dir=model_dir, micro_rows=8), dp_rank=0).micro_batches[0]
    rows = torch.from_numpy(batch.response_mask)
    targets = torch.from_numpy(np.roll(batch.tokens, -1, axis=1))[rows]
    loss = torch.nn.functional.cross_entropy(
        model(torch.from_numpy(batch.tokens)).logits[rows], targets
    )
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), {n.replace(".default", ""): grad for n, grad in found.items()}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_pefts(
    models: dict[str, str], trained: dict[str, str], family: str, name: str
) -> None:
    loss, expected = peft_gradients(models[family], trained[family])
    run = lora_run(models[family], LAYOUTS[name], path=trained[family])
    result, got = run_ranks(gradients, run.layout.world_size, run)[0]
    assert result.loss == pytest.approx(loss, rel=1e-5)
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)  # what is whole counts once
    assert got.keys() == expected.keys() and len(got) == 2 * 2 * len(ALL)
    worst = max(relative(got[key], expected[key]) for key in expected)
    print(f"gradient difference {worst:.1e}")
    assert worst < 1e-4


@pytest.mark.parametrize("recompute", [None, "full"])
def test_recomputed_layers_have_the_same_gradients(
    models: dict[str, str], trained: dict[str, str], recompute: str | None
) -> None:
    """The first layer's input comes from a frozen embedding, so nothing asks for its gradient."""
    _, expected = peft_gradients(models["llama"], trained["llama"])
    keys = {"recompute": {"granularity": recompute}}
    run = lora_run(models["llama"], Layout(tp=2), path=trained["llama"], **keys)
    _, got = run_ranks(gradients, 2, run)[0]
    assert max(relative(got[key], expected[key]) for key in expected) < 1e-4


def train(run: Run, out: str) -> tuple[list[StepResult], Tensors, Tensors, dict[str, torch.Tensor]]:
    """Steps, the merged weights, the base's weights, and logits with and without adapters."""
    student = worlds.build(run)
    model, dp_rank = student.model, student.model.topology.dp_rank
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    results = [student.train_step(step_batch(i, run=run, dp_rank=dp_rank)) for i in range(3)]
    for name, parameter in model.named_parameters():
        assert name not in base or torch.equal(parameter, base[name]), name
    logits = {"on": student.forward_logits(TOKENS)}
    merged = worlds.full_weights(student)
    with adapter_off(model):
        logits["off"] = student.forward_logits(TOKENS)
        plain = {n: t.clone() for n, t in iter_hf_weights(model) if t is not None}
    assert torch.equal(student.forward_logits(TOKENS), logits["on"])
    if dp_rank == 0:
        adapter_io.save_peft(model, out, base_dir=run.model_dir)
    return results, merged, plain, logits


def check_merged(merged: Tensors, base: Tensors, adapter: Tensors, *, targets: Any = ALL) -> None:
    """Every weight is the base's, plus alpha / rank * B A where there is an adapter."""
    changed = 0
    assert merged.keys() == base.keys()
    for name, weight in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (adapter.get(f"{prefix}.lora_{letter}.weight") for letter in "AB")
        if a is None or b is None:
            assert torch.equal(merged[name], weight), name
            continue
        changed += 1
        assert float(b.abs().max()) > 0 and name.split(".")[-2] in targets
        expected = weight.float() + ALPHA / RANK * b.float() @ a.float()
        torch.testing.assert_close(merged[name], expected.to(weight.dtype), atol=1e-6, rtol=1e-2)
    assert changed == 2 * len(targets)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", [*LAYOUTS, "dp2", "dp2-distributed"])
def test_training_agrees_with_one_process(
    models: dict[str, str], tmp_path: Path, family: str, name: str
) -> None:
    """And what is exported, merged or not, computes what the student computes."""
    layout = LAYOUTS.get(name, Layout(dp=2))
    run = lora_run(models[family], layout)
    outs = [str(tmp_path / "one"), str(tmp_path / "other")]
    expected, *_ = run_ranks(train, 1, lora_run(models[family], Layout()), outs[0])[0]
    function = train_distributed if name == "dp2-distributed" else train
    ranks = run_ranks(function, layout.world_size, run, outs[1])
    for results, *_ in ranks:
        for got, want in zip(results, expected, strict=True):
            assert got.loss == pytest.approx(want.loss, rel=1e-4)
            assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
    _, merged, plain, logits = ranks[0]
    ours, theirs = (load_file(Path(out) / "adapter_model.safetensors") for out in outs)
    assert max(relative(theirs[key], ours[key]) for key in ours) < 1e-4
    source = load_file(Path(models[family]) / "model.safetensors")
    assert all(torch.equal(plain[key], source[key]) for key in source)
    check_merged(merged, source, theirs)
    peft = peft_logits(models[family], outs[1])
    print(
        f"adapter {max(relative(theirs[key], ours[key]) for key in ours):.1e}, "
        f"logits {float((logits['on'] - peft).abs().max()):.1e}"
    )
    torch.testing.assert_close(logits["on"], peft, atol=1e-4, rtol=0.0)
    base = run_ranks(worlds.logits, layout.world_size, Run(models[family], layout), TOKENS)[0]
    assert torch.equal(logits["off"], base)
    assert relative(logits["on"], base) > 1e-2


def train_distributed(run: Run, out: str) -> Any:
    """`train` with the optimizer's state split over the replicas."""
    plain = worlds.build
    section = OptimizerSection(
        lr=1e-2,
        lr_warmup_fraction=0.2,
        adam_eps=1e-4,
        clip_grad=0.5,
        use_distributed_optimizer=True,
    )
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # Megatron looks at the gradient of its shards, which are views.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
        patch.setattr(worlds, "build", lambda run: plain(run, section=section))
        return train(run, out)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj", "up_proj", "down_proj")])
def test_a_subset_of_layers(models: dict[str, str], tmp_path: Path, targets: Any) -> None:
    """In a layer that holds several, those without an adapter stay as they are."""
    run = lora_run(models["qwen3"], Layout(tp=2), targets=targets)
    _, merged, _, logits = run_ranks(train, 2, run, str(tmp_path / "out"))[0]
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    source = load_file(Path(models["qwen3"]) / "model.safetensors")
    check_merged(merged, source, adapter, targets=targets)
    peft = peft_logits(models["qwen3"], str(tmp_path / "out"))
    torch.testing.assert_close(logits["on"], peft, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("name", ["one", "tp2-sp"])
def test_bfloat16(tmp_path: Path, name: str) -> None:
    model_dir = str(worlds.make_model("qwen3", tmp_path / "model", dtype=torch.bfloat16))
    out, layout = str(tmp_path / "out"), LAYOUTS[name]
    run = lora_run(model_dir, layout, dtype="bfloat16")
    results, merged, _, logits = run_ranks(train, layout.world_size, run, out)[0]
    wide, *_ = run_ranks(train, 1, lora_run(model_dir, Layout()), str(tmp_path / "wide"))[0]
    for got, want in zip(results, wide, strict=True):
        assert got.loss == pytest.approx(want.loss, rel=2e-2)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=5e-2)
    adapter = load_file(Path(out) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.bfloat16}
    check_merged(merged, load_file(Path(model_dir) / "model.safetensors"), adapter)
    exact = peft_logits(model_dir, out)  # the same numbers, computed in float32
    theirs = peft_logits(model_dir, out, torch.bfloat16)
    rounding = float((theirs - exact).abs().max())
    assert float((logits["on"] - exact).abs().max()) < 2 * rounding


def test_interleaved_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worlds.SIZES, "num_hidden_layers", 4)
    model_dir = str(worlds.make_model("qwen3", tmp_path / "model"))
    adapter = make_adapter(model_dir, ALL, tmp_path / "adapter")
    loss, expected = peft_gradients(model_dir, adapter)
    run = lora_run(model_dir, Layout(pp=2, vp=2), path=adapter)
    result, got = run_ranks(gradients, 2, run)[0]
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert got.keys() == expected.keys()
    assert max(relative(got[key], expected[key]) for key in expected) < 1e-4


@pytest.mark.parametrize("name", ["tp2", "tp2-sp"])
def test_the_head_and_its_loss_may_be_one(models: dict[str, str], name: str) -> None:
    """Through a frozen output weight, which gets no gradient of its own."""
    run = lora_run(models["qwen3"], LAYOUTS[name])
    fused, plain = (run_ranks(fused_step.train, 2, run, way)[0] for way in (True, False))
    for got, want in zip(fused[0], plain[0], strict=True):
        assert got.grad_norm > 0
        assert got.loss == pytest.approx(want.loss, rel=1e-6)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-5)
    assert max(relative(fused[1][key], plain[1][key]) for key in plain[1]) < 1e-5


def start(run: Run) -> Tensors:
    return gathered(worlds.build(run))


def test_fresh_adapters_do_not_depend_on_the_layout(models: dict[str, str]) -> None:
    one, *others = (
        run_ranks(start, layout.world_size, lora_run(models["llama"], layout))[0]
        for layout in (Layout(), Layout(tp=2), Layout(pp=2))
    )
    for other in others:
        assert all(torch.equal(other[key], one[key]) for key in one)
    a = {key: value for key, value in one.items() if "lora_A" in key}
    assert all(not value.any() for key, value in one.items() if key not in a)
    for value in a.values():
        bound = 1 / math.sqrt(value.shape[1])
        assert 0.9 * bound < float(value.abs().max()) <= bound
    assert len({float(value[0, 0]) for value in a.values()}) == len(a)


def described(run: Run) -> dict[str, tuple[Any, ...]]:
    """Of every adapter tensor: its global shape, this rank's offset, and whether it is a copy."""
    from megatron.core import parallel_state

    model = worlds.build(run).model
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    found: dict[str, tuple[Any, ...]] = {}
    layer = model.chunks[0].decoder.layers[0]
    for module in (layer.self_attention.linear_qkv, layer.self_attention.linear_proj):
        for key, entry in module.sharded_state_dict("m.", metadata=metadata).items():
            if "adapter" in key or key.endswith("weight"):
                place = (entry.global_shape, entry.global_offset, tuple(entry.data.shape))
                found[f"{type(module).__name__} {key}"] = (*place, entry.replica_id)
    return found


def test_shards_are_described_to_megatron(models: dict[str, str]) -> None:
    run = lora_run(models["llama"], Layout(tp=2))  # hidden 64, 4 heads of 32, 2 query groups
    for rank, found in enumerate(run_ranks(described, 2, run)):
        column = "LoraNormColumnParallelLinear m."
        row = "LoraRowParallelLinear m."
        copy = (0, rank, 0)  # of which Megatron saves that of tensor-parallel rank 0
        assert found[column + "adapter.q_proj.lora_A"] == ((4, 64), (0, 0), (4, 64), copy)
        assert found[column + "adapter.q_proj.lora_B"][:3] == ((128, 4), (64 * rank, 0), (64, 4))
        assert found[column + "adapter.v_proj.lora_B"][:3] == ((64, 4), (32 * rank, 0), (32, 4))
        assert found[row + "adapter.o_proj.lora_A"][:3] == ((4, 128), (0, 64 * rank), (4, 64))
        assert found[row + "adapter.o_proj.lora_B"] == ((64, 4), (0, 0), (64, 4), copy)
        assert found[column + "weight"][:3] == ((256, 64), (128 * rank, 0), (128, 64))
        shards = [v for k, v in found.items() if k.endswith(("q_proj.lora_B", "o_proj.lora_A"))]
        assert [entry[3] for entry in shards] == [(0, 0, 0)] * 2


def test_an_adapter_of_another_model_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    adapter = make_adapter(models["llama"], ALL, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    from safetensors.torch import save_file

    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for broken, match in (
        ({k: v for k, v in tensors.items() if k != first}, "has no tensor"),
        (tensors | {first: tensors[first][:, 1:].contiguous()}, "has shape"),
    ):
        save_file(broken, weights)
        with pytest.raises(RankError, match=match):
            run_ranks(start, 1, lora_run(models["llama"], Layout(), path=adapter))


def test_what_is_written_is_what_is_read(trained: dict[str, str], tmp_path: Path) -> None:
    """The check of a directory that PEFT wrote, and of one that `save_peft` describes."""
    section = LoraSection(rank=RANK, alpha=ALPHA, path=trained["llama"])
    assert list(check_adapter(section)) == []
    content = json.loads((Path(trained["llama"]) / "adapter_config.json").read_text())
    adapters = adapter_io.Adapters(section=section, targets=())
    ours = adapter_io.describe_adapter(adapters, content["base_model_name_or_path"])
    kept = {key: content[key] for key in ours if key not in ("target_modules", "init_lora_weights")}
    assert kept == {key: ours[key] for key in kept}
