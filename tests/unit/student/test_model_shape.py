"""Reading config.json, and which layouts a model allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mopd.config.model_shape import Llama3Rope, check_layout, read_model_config
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
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM.*LlamaForCausalLM, Qwen2"),
        ({"architectures": None}, "none, which is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "rotates a part"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
    ],
)
def test_what_is_not_supported_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_model_config(write(tmp_path, **changes))


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
        (1, 1, 2, 2, ["not supported yet, use 1"]),
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
