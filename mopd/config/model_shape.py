"""The shape of a Hugging Face model, read from its config.json without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopd.config.recipe_files import RECIPES
from mopd.errors import ConfigError

SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)

CATALOGUE = RECIPES / "models"  # config.json by model name


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """Llama 3's stretching of the rotary frequencies (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeShape:
    """A mixture of experts in place of the feed-forward part of some layers."""

    num_experts: int
    num_experts_per_tok: int
    ffn_hidden_size: int  # of one expert
    norm_topk_prob: bool  # the weights of a token's experts sum to 1
    router_aux_loss_coef: float
    layers: tuple[int, ...]  # that have experts; the others are dense


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Everything about a decoder that decides its parameters and its forward pass."""

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: Llama3Rope | None
    qkv_bias: bool
    qk_norm: bool
    tied: bool  # input and output embeddings share one weight
    sliding_window: int | None = None  # a token attends to so many, itself included; None: to all
    moe: MoeShape | None = None

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers with experts, ascending; none in a dense model."""
        return () if self.moe is None else self.moe.layers


def find_model_config(model: str | Path, *, key: str = "student.model") -> Path:
    """`config.json` of a Hugging Face directory, or of `recipes/models/<its last part>`.

    Raises ConfigError, with the ``key`` that names the model, where neither is there.
    """
    own, listed = Path(model) / "config.json", CATALOGUE / Path(model).name / "config.json"
    for path in (own, listed):
        if path.is_file():
            return path
    raise ConfigError(
        f"{key}: neither {own} nor {listed} exists; download the model and give its directory, or "
        "put its config.json under the second name"
    )


def read_model_config(model_dir: str | Path) -> ModelShape:
    """Read `config.json`. Raises ConfigError that names what is missing or not supported."""
    path = Path(model_dir) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"student.model: {path} does not exist; point student.model at a Hugging Face "
            "directory with config.json and *.safetensors"
        ) from error
    except ValueError as error:
        raise ConfigError(f"student.model: {path} is not valid JSON: {error}") from error
    architecture = _architecture(raw, path)
    _refuse_variants(raw, architecture, path)
    try:
        return _shape(raw, architecture, path)
    except KeyError as error:
        raise ConfigError(f"student.model: {path} lacks the key {error}") from error


def _architecture(raw: Mapping[str, Any], path: Path) -> str:
    names = raw.get("architectures") or ["none"]
    if names[0] not in SUPPORTED_ARCHITECTURES:
        raise ConfigError(
            f"student.model: {path} is a {names[0]}, which is not supported; use one of "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return names[0]


def _refuse_variants(raw: Mapping[str, Any], architecture: str, path: Path) -> None:
    refused = {
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(raw.get("attention_bias")),
        "mlp_bias": bool(raw.get("mlp_bias")),
        "use_sliding_window": bool(raw.get("use_sliding_window")),
        "quantization_config": raw.get("quantization_config") is not None,
    }
    for key, is_refused in refused.items():
        if is_refused:
            raise ConfigError(
                f"student.model: {path} sets {key}={raw[key]!r}, which is not supported for "
                f"{architecture}; choose a model without it"
            )


def _shape(raw: Mapping[str, Any], architecture: str, path: Path) -> ModelShape:
    heads = raw["num_attention_heads"]
    theta, scaling = _rope(raw, path)
    return ModelShape(
        architecture=architecture,
        num_layers=raw["num_hidden_layers"],
        hidden_size=raw["hidden_size"],
        ffn_hidden_size=raw["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        vocab_size=raw["vocab_size"],
        max_position_embeddings=raw["max_position_embeddings"],
        norm_epsilon=raw["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        tied=bool(raw.get("tie_word_embeddings", False)),
        sliding_window=raw.get("sliding_window") if architecture == "MistralForCausalLM" else None,
        moe=_moe(raw, path) if architecture == "Qwen3MoeForCausalLM" else None,
    )


def _moe(raw: Mapping[str, Any], path: Path) -> MoeShape | None:
    """None where every layer is dense."""
    # transformers 5 writes num_local_experts, older versions and published models num_experts.
    num_experts = raw["num_experts"] if "num_experts" in raw else raw["num_local_experts"]
    step, dense = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers") or ()
    layers = tuple(
        layer
        for layer in range(raw["num_hidden_layers"])
        if num_experts and layer not in dense and (layer + 1) % step == 0
    )
    if not layers:
        return None
    moe = MoeShape(
        num_experts=num_experts,
        num_experts_per_tok=raw["num_experts_per_tok"],
        ffn_hidden_size=raw["moe_intermediate_size"],
        norm_topk_prob=bool(raw.get("norm_topk_prob", False)),
        router_aux_loss_coef=float(raw.get("router_aux_loss_coef", 0.001)),
        layers=layers,
    )
    if moe.num_experts_per_tok == 1 and moe.norm_topk_prob:
        raise ConfigError(
            f"student.model: {path} sets norm_topk_prob with num_experts_per_tok=1, so its routers "
            "have no gradient; choose a model with more experts per token"
        )
    return moe


def _rope(raw: Mapping[str, Any], path: Path) -> tuple[float, Llama3Rope | None]:
    """Rotary base and scaling, from `rope_parameters` or the older `rope_theta`/`rope_scaling`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(f"student.model: {path} rotates a part of each head: not supported")
    if kind == "default":
        return float(theta), None
    if kind == "llama3":
        return float(theta), Llama3Rope(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
        )
    raise ConfigError(
        f"student.model: {path} scales its rotary embedding with rope_type {kind!r}, which is not "
        "supported; use a model with rope_type default or llama3"
    )
