"""Reading config.json, and which layouts a model allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mopd.config.check_layout import check_layout
from mopd.config.model_shape import (
    SUPPORTED_ARCHITECTURES,
    Llama3Rope,
    MoeShape,
    read_model_config,
)
from mopd.config.schema import ParallelSection
from mopd.errors import ConfigError

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 67,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
    "hidden_act": "silu",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write(directory: Path, **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    return directory


def test_shape_of_an_older_config(tmp_path: Path) -> None:
    shape = read_model_config(write(tmp_path))
    assert (shape.head_dim, shape.num_query_groups, shape.rope_theta) == (16, 2, 5e5)
    assert (shape.qkv_bias, shape.qk_norm, shape.tied) == (False, False, False)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_llama3_scaling_in_both_spellings(tmp_path: Path, key: str) -> None:
    shape = read_model_config(write(tmp_path, **{key: LLAMA3}))
    assert shape.rope_scaling == Llama3Rope(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    assert shape.rope_theta == 5e5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "none, which is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "rotates a part"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        (
            {
                "architectures": ["Qwen3MoeForCausalLM"],
                "num_experts": 4,
                "num_experts_per_tok": 1,
                "moe_intermediate_size": 32,
                "norm_topk_prob": True,
            },
            "num_experts_per_tok=1",
        ),
    ],
)
def test_what_is_not_supported_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_model_config(write(tmp_path, **changes))


@pytest.mark.parametrize(
    "architecture",
    [
        "Gemma3ForCausalLM",
        "DeepseekV3ForCausalLM",
        "GptOssForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen2_5_VLForConditionalGeneration",
    ],
)
def test_other_architectures_are_refused_with_the_list(tmp_path: Path, architecture: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_model_config(write(tmp_path, architectures=[architecture]))
    message = str(caught.value)
    assert f"is a {architecture}, which is not supported" in message and "\n" not in message
    assert all(name in message for name in SUPPORTED_ARCHITECTURES)


def test_only_mistral_has_a_window(tmp_path: Path) -> None:
    shapes = {
        name: read_model_config(write(tmp_path, architectures=[name], sliding_window=4096))
        for name in ("MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
    }
    windows = {name: shape.sliding_window for name, shape in shapes.items()}
    assert windows == {
        "MistralForCausalLM": 4096,
        "Qwen2ForCausalLM": None,
        "Qwen3ForCausalLM": None,
    }


MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.01,
}


def test_experts(tmp_path: Path) -> None:
    moe = MoeShape(
        num_experts=8,
        num_experts_per_tok=2,
        ffn_hidden_size=48,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        layers=(0, 1, 2, 3),
    )
    shape = read_model_config(write(tmp_path, **MOE))
    assert shape.moe == moe and shape.qk_norm
    newer = {k: v for k, v in MOE.items() if k != "num_experts"} | {"num_local_experts": 8}
    assert read_model_config(write(tmp_path, **newer)).moe == moe
    every_other = read_model_config(write(tmp_path, **MOE, decoder_sparse_step=2))
    assert every_other.sparse_layers == (1, 3)
    mixed = read_model_config(write(tmp_path, **MOE, mlp_only_layers=[0, 3]))
    assert mixed.sparse_layers == (1, 2)
    dense = read_model_config(write(tmp_path, **MOE, mlp_only_layers=[0, 1, 2, 3]))
    assert dense.moe is None and dense.sparse_layers == ()


def test_missing_file_bad_json_and_missing_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_model_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(ConfigError, match="lacks the key"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("tp", "pp", "cp", "world", "problems"),
    [
        (1, 1, 1, 1, []),
        (2, 2, 1, 8, []),
        (4, 1, 1, 4, ["query groups"]),
        (3, 1, 1, 3, ["attention heads", "query groups"]),
        (1, 3, 1, 3, ["layers"]),
        (1, 1, 2, 2, []),
        (2, 1, 1, 3, ["number of processes (3)"]),
    ],
)
def test_layouts(
    tmp_path: Path, tp: int, pp: int, cp: int, world: int, problems: list[str]
) -> None:
    parallel = ParallelSection(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp
    )
    found = check_layout(read_model_config(write(tmp_path)), parallel, world)
    assert len(found) == len(problems)
    assert all(want in got for want, got in zip(problems, found, strict=True))


@pytest.mark.parametrize(
    ("model", "sizes", "world", "problems"),
    [
        ({}, {"vp": 2, "pp": 2}, 2, []),
        ({}, {"vp": 2}, 1, ["virtual_pipeline_model_parallel_size=2 interleaves"]),
        ({}, {"vp": 3, "pp": 2}, 2, ["(2 x 3) must divide the model's layers (4)"]),
        ({}, {"sp": True}, 1, ["sequence_parallel=true splits over"]),
        ({}, {"sp": True, "tp": 2}, 2, []),
        ({}, {"ep": 2}, 2, ["a LlamaForCausalLM is not; use 1"]),
        (MOE, {"ep": 2}, 2, []),
        (MOE, {"ep": 2, "cp": 2}, 2, []),
        (MOE, {"ep": 2, "tp": 2, "sp": True}, 4, []),
        (MOE, {"ep": 2, "tp": 2}, 4, ["needs sequence_parallel=true"]),
        (MOE, {"ep": 3}, 3, ["must divide the model's experts (8)"]),
        (MOE, {"ep": 4}, 2, ["must divide data x context parallel size (2)"]),
        (MOE | {"moe_intermediate_size": 49}, {"tp": 2, "sp": True}, 2, ["experts' feed-forward"]),
        (MOE | {"intermediate_size": 49}, {"tp": 2, "sp": True}, 2, []),  # no layer uses it
    ],
)
def test_layouts_of_pipelines_and_experts(
    tmp_path: Path, model: dict, sizes: dict, world: int, problems: list[str]
) -> None:
    keys = {
        "tp": "tensor_model_parallel_size",
        "sp": "sequence_parallel",
        "pp": "pipeline_model_parallel_size",
        "vp": "virtual_pipeline_model_parallel_size",
        "cp": "context_parallel_size",
        "ep": "expert_model_parallel_size",
    }
    parallel = ParallelSection(**{keys[name]: size for name, size in sizes.items()})
    found = check_layout(read_model_config(write(tmp_path, **model)), parallel, world)
    assert len(found) == len(problems)
    for want, got in zip(problems, found, strict=True):
        assert want in got and got.startswith("student.parallel: ") and "\n" not in got
