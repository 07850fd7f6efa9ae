"""Sizes of models against transformers, and the formulas of the estimate by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mopd.config.model_shape import ModelShape
from mopd.config.model_size import ModelSize, count_parameters, read_model_size
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError
from mopd.losses.sizes import block_rows
from mopd.runtime.memory import Shapes, estimate, too_large
from mopd.runtime.memory_engine import engine_parts
from mopd.runtime.memory_student import StudentJob, activation_bytes, logits_bytes, student_parts
from mopd.runtime.placement import place

SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 3001,
}
EXPERTS = {"num_experts": 8, "moe_intermediate_size": 192, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {}),
    "Llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "Mistral": ("MistralConfig", {}),
    "Mixtral": ("MixtralConfig", {}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen2-MoE": ("Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 300}),
    "Qwen3": ("Qwen3Config", {"head_dim": 96}),
    "Qwen3-MoE": ("Qwen3MoeConfig", EXPERTS | {"mlp_only_layers": [1]}),
    "Gemma": ("GemmaConfig", {}),
    "Gemma 2": ("Gemma2Config", {}),
    "Gemma 3": ("Gemma3TextConfig", {}),
    "DeepSeek 3": (
        "DeepseekV3Config",
        {"n_routed_experts": 8, "moe_intermediate_size": 128, "first_k_dense_replace": 1},
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("use_diff", [False, True])
def test_parameters_are_those_of_transformers(name: str, use_diff: bool) -> None:
    import transformers as tf

    kind, more = FAMILIES[name]
    config = getattr(tf, kind)(**SIZES, **more)
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    real = sum(parameter.numel() for parameter in model.parameters())
    raw = json.loads(config.to_json_string(use_diff=use_diff))
    assert count_parameters(raw) == pytest.approx(real, rel=0.005)


def write(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **SIZES, **changes}))
    return path


def test_size_of_a_config(tmp_path: Path) -> None:
    size = read_model_size(write(tmp_path, torch_dtype="float32"), key="teachers.a.model")
    assert (size.kv_size, size.num_kv_heads, size.is_float32) == (2 * 2 * 64, 2, True)
    assert (size.bits, size.max_length) == (None, None)
    fp8 = {"quantization_config": {"quant_method": "fp8"}}
    assert read_model_size(write(tmp_path, **fp8), key="x").bits == 8
    nested = tmp_path / "config.json"
    nested.write_text(json.dumps({"text_config": SIZES, **fp8}))
    assert read_model_size(nested, key="x").bits == 8
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128}
    size = read_model_size(write(tmp_path, **latent, v_head_dim=128), key="x")
    assert (size.kv_size, size.num_kv_heads) == (576, 1)


def test_a_config_without_a_size_names_its_key(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"^teachers\.a\.model: .* lacks the key 'num_attention"):
        read_model_size(path, key="teachers.a.model")
    path.write_text("[")
    with pytest.raises(ConfigError, match=r"^teachers\.a\.model: .* cannot be read"):
        read_model_size(path, key="teachers.a.model")


SHAPE = ModelShape(
    architecture="LlamaForCausalLM",
    num_layers=8,
    hidden_size=512,
    ffn_hidden_size=1024,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=64,
    vocab_size=1000,
    max_position_embeddings=4096,
    norm_epsilon=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    qkv_bias=False,
    qk_norm=False,
    tied=False,
)


def job(ranks: int = 1, *, device_type: str = "cuda", **student: Any) -> StudentJob:
    config = RunConfig.model_validate(
        {
            "student": {"dtype": "bfloat16", **student},
            "train": {"num_prompts_per_step": 64, "max_tokens_per_micro_batch": 1000},
            "rollout": {"max_new_tokens": 488},
        }
    )
    return StudentJob(config=config, shape=SHAPE, num_ranks=ranks, device_type=device_type)


def parallel(**sizes: int) -> dict[str, Any]:
    names = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vp": "virtual_pipeline_model_parallel_size",
        "cp": "context_parallel_size",
    }
    return {"parallel": {names[key]: size for key, size in sizes.items()}}


def test_a_layers_activations_by_hand() -> None:
    # queries 512, keys and values 256 each, in bfloat16
    norms = 2 * 512 * (4 + 2 + 2)
    attention = 2 * (512 + 2 * 256) + 2 * (512 + 256) + 2 * 512 + 4 * 8
    feed_forward = 5 * 2 * 1024
    final = 512 * 8
    wanted = 1000 * (8 * (norms + attention + feed_forward) + final)
    assert activation_bytes(job(), stage=0) == wanted


def test_recomputation_keeps_inputs_and_one_block() -> None:
    whole = (activation_bytes(job(), stage=0) - 1000 * 512 * 8) // 8
    full = {"recompute": {"granularity": "full", "num_layers": 2}}
    inputs, final = 4 * 1000 * 512 * 2, 1000 * 512 * 8
    assert activation_bytes(job(**full), stage=0) == inputs + final + 2 * whole
    block = {"recompute": {"granularity": "full", "method": "block", "num_layers": 3}}
    inputs = 3 * 1000 * 512 * 2
    assert activation_bytes(job(**block), stage=0) == inputs + final + (5 + 1) * whole


def test_micro_batches_in_flight() -> None:
    # 64 texts of 1000 tokens are 64 micro-batches, so that the pipeline is full
    layers = activation_bytes(job(), stage=0) - 1000 * 512 * 8
    stages = [activation_bytes(job(4, **parallel(pp=4)), stage=stage) for stage in range(4)]
    assert stages[:3] == [layers, layers * 3 // 4, layers * 2 // 4]
    assert stages[3] == layers // 4 + 1000 * 512 * 8
    # 2 (p - r - 1) + (v - 1) p + 1 pieces of a v-th of the stage's layers: 5 of 2 layers
    first = activation_bytes(job(2, **parallel(pp=2, vp=2)), stage=0)
    assert first == layers // 8 * 2 * 5
    few = job(4, **parallel(pp=4))
    train = few.config.train.model_copy(update={"num_prompts_per_step": 2})
    few = replace(few, config=few.config.model_copy(update={"train": train}))
    assert activation_bytes(few, stage=0) == layers // 4 * 2


def test_context_and_tensor_parallel_parts() -> None:
    assert job(2, **parallel(cp=2)).micro_batch_tokens == 500
    split = job(2, parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True})
    assert activation_bytes(split, stage=0) * 2 == activation_bytes(job(), stage=0)


def test_the_logits_block_by_hand() -> None:
    rows = block_rows("cuda", 1000)
    assert rows == 4096 and block_rows("cpu", 1000) == 1000
    block = 1000 * 1000 * 4 * 5  # all 1000 rows: upcast, gradient, three temporaries
    panel, states, weight = 1000 * 1000 * 2, 1000 * 512 * 6, 1000 * 512 * 6
    assert logits_bytes(job()) == block + panel + states + weight
    assert logits_bytes(job(fused_head=False)) == block + 2 * panel
    assert logits_bytes(job(lora={"rank": 4})) == block + panel + states
    parts = student_parts(job(2, **parallel(pp=2)), stage=0)
    assert "logits block" not in parts  # the last stage's alone


SIZE = ModelSize(
    num_parameters=10**9,
    num_layers=10,
    hidden_size=512,
    vocab_size=1000,
    num_kv_heads=4,
    kv_size=2 * 4 * 64,
    max_length=None,
    bits=None,
    is_float32=False,
)


def served(**backend: Any) -> RunConfig:
    backend = {"type": "vllm", "max_outstanding": 4} | backend
    return RunConfig.model_validate(
        {
            "teachers": {"a": {"model": "a", "backend": backend}},
            "rollout": {"max_new_tokens": 488, "backend": {"type": "vllm"}},
        }
    )


def test_an_engine_by_hand() -> None:
    parts = engine_parts(served(), "teachers.a", SIZE, device="gpu")
    assert parts["weights"] == 2 * 10**9
    assert parts["KV cache"] == 4 * 1000 * 10 * 512 * 2
    assert parts["logits block"] == 1000 * 1000 * 6
    split = served(server={"tensor_parallel_size": 8})
    parts = engine_parts(split, "teachers.a", SIZE, device="gpu")
    assert parts["weights"] == 2 * 10**9 // 8
    assert parts["KV cache"] == 4 * 1000 * 10 * 512 * 2 // 4  # four heads, each twice
    on_host = engine_parts(served(), "teachers.a", SIZE, device="cpu")
    assert on_host["weights"] == 4 * 10**9
    fp8 = engine_parts(served(), "teachers.a", replace(SIZE, bits=8.0), device="gpu")
    assert fp8["weights"] == 10**9
    sampler = engine_parts(served(), "rollout", SIZE, device="gpu")
    assert sampler["weights"] == 4 * 10**9  # the student's type, float32
    assert sampler["KV cache"] == 64 * 1000 * 10 * 512 * 4


def test_teachers_on_the_students_ranks_count_once_where_they_are_offloaded() -> None:
    def total(offload: bool) -> int:
        backend = {"type": "megatron", "offload": offload}
        teachers = {name: {"model": name, "backend": backend} for name in "ab"}
        config = RunConfig.model_validate({"teachers": teachers})
        shapes = Shapes(student=SHAPE, sizes={}, inside={"teachers.a": SHAPE, "teachers.b": SHAPE})
        (share,) = estimate(config, place(config, device="gpu"), shapes)
        return share.parts["teachers inside"]

    assert total(False) == 2 * total(True)


def test_projections_are_in_the_last_stage_of_recipes_that_read_them() -> None:
    def parts(loss: str) -> list[int | None]:
        config = served()
        section = config.distillation.model_copy(update={"loss": loss})
        student = config.student.model_validate(parallel(pp=2, tp=2))
        config = config.model_copy(update={"distillation": section, "student": student})
        shapes = Shapes(student=SHAPE, sizes={"teachers.a": SIZE, "rollout": SIZE}, inside={})
        shares = estimate(config, place(config, device="gpu"), shapes)
        return [one.parts.get("projection") for one in shares if one.owner == "student"]

    # 500 rows of 2 entries, 12 bytes each, and 16 bytes for each of the teacher's 1000 tokens
    assert parts("ctkd") == [None, 500 * 2 * 12 + 1000 * 16]
    assert parts("gold") == [None, None]


def test_a_device_that_is_too_small_is_told_what_to_change() -> None:
    config = served()
    config = config.model_copy(
        update={"cluster": config.cluster.model_copy(update={"device_memory_gb": 1.0})}
    )
    plan = place(config, device="gpu")
    shapes = Shapes(student=SHAPE, sizes={"teachers.a": SIZE}, inside={})
    shares = estimate(config, plan, shapes)
    said = too_large(config, plan, shares)
    (line,) = [line for line in said if line.startswith("teachers.a ")]
    assert line == (
        "teachers.a (engine) needs 2.1 GB, most of it weights, and a device has 1: raise "
        "teachers.a.backend.server.tensor_parallel_size, or serve a quantized model"
    )
