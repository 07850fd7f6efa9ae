"""How big a model of any decoder architecture is, from its config.json alone. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopd.errors import ConfigError

# Feed-forward parts of two matrices; all other decoders have a gate as well.
UNGATED = ("gpt2", "gpt_neox", "gpt_neo", "gptj", "opt", "bloom", "falcon", "phi", "starcoder2")
FOUR_NORMS = ("gemma2", "gemma3_text", "gemma3", "glm4", "olmo2")  # per layer, two elsewhere
# Where a config does not say it, transformers takes these to share input and output embeddings.
TIED = ("gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "opt", "bloom", "falcon")
QUANTIZED_BITS = {"fp8": 8, "compressed-tensors": 8, "mxfp4": 4.25, "awq": 4, "gptq": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What of a decoder decides the memory of an engine that runs it."""

    num_parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_kv_heads: int
    kv_size: int  # elements that a token leaves in the cache of one layer, all heads
    max_length: int | None  # tokens of the longest text
    bits: float | None  # of a quantized weight; None: not quantized
    is_float32: bool  # as it is stored


def read_model_size(path: Path, *, key: str) -> ModelSize:
    """Read a config.json. Raises ConfigError, with the ``key`` that names the model."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return _size(raw.get("text_config") or raw, raw)
    except KeyError as error:
        raise ConfigError(f"{key}: {path} lacks the key {error}; the size is not known") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{key}: {path} cannot be read ({error})") from error


def _size(raw: Mapping[str, Any], whole: Mapping[str, Any]) -> ModelSize:
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    groups = raw.get("num_key_value_heads") or heads
    head = raw.get("head_dim") or hidden // heads
    latent = raw.get("kv_lora_rank")  # DeepSeek's latent attention (2405.04434, 2.1)
    quantized = whole.get("quantization_config") or {}
    bits = quantized.get("bits") or QUANTIZED_BITS.get(str(quantized.get("quant_method")), 16)
    return ModelSize(
        num_parameters=count_parameters(raw),
        num_layers=raw["num_hidden_layers"],
        hidden_size=hidden,
        vocab_size=raw["vocab_size"],
        num_kv_heads=1 if latent else groups,
        kv_size=latent + raw["qk_rope_head_dim"] if latent else 2 * groups * head,
        max_length=raw.get("max_position_embeddings"),
        bits=float(bits) if quantized else None,
        is_float32=(whole.get("dtype") or whole.get("torch_dtype")) == "float32",
    )


def count_parameters(raw: Mapping[str, Any]) -> int:
    """Parameters of a decoder by the usual keys of transformers' configs.

    Exact to 0.5 % for Llama, Mistral, Qwen 2 and 3, Qwen 3 MoE and Gemma; a guess for others.
    Raises KeyError for a key without which there is no count.
    """
    hidden, kind = raw["hidden_size"], raw.get("model_type", "")
    tied = raw.get("tie_word_embeddings")
    tied = kind in TIED if tied is None else tied
    embeddings = raw["vocab_size"] * hidden * (1 if tied else 2)
    num_layers = raw["num_hidden_layers"]
    sparse = len(_sparse_layers(raw))
    norms = (4 if kind in FOUR_NORMS else 2) * hidden
    layers = num_layers * (_attention(raw) + norms)
    layers += sparse * _experts(raw) + (num_layers - sparse) * _dense(raw, kind)
    return embeddings + layers + hidden


def _attention(raw: Mapping[str, Any]) -> int:
    hidden, heads = raw["hidden_size"], raw["num_attention_heads"]
    if raw.get("kv_lora_rank"):
        return _latent_attention(raw)
    groups = raw.get("num_key_value_heads") or heads
    head = raw.get("head_dim") or hidden // heads
    weights = 2 * hidden * heads * head + 2 * hidden * groups * head
    biased = raw.get("attention_bias") or raw.get("model_type") in ("qwen2", "qwen2_moe")
    return weights + (heads + 2 * groups) * head * bool(biased)


def _latent_attention(raw: Mapping[str, Any]) -> int:
    """Queries, and keys with values, through low-rank bottlenecks (2405.04434, 2.1)."""
    hidden, heads, latent = raw["hidden_size"], raw["num_attention_heads"], raw["kv_lora_rank"]
    nope, rope, value = raw["qk_nope_head_dim"], raw["qk_rope_head_dim"], raw["v_head_dim"]
    low = raw.get("q_lora_rank")
    queries = (hidden + heads * (nope + rope)) * low if low else hidden * heads * (nope + rope)
    keys = hidden * (latent + rope) + latent * heads * (nope + value)
    return queries + keys + heads * value * hidden


def _dense(raw: Mapping[str, Any], kind: str) -> int:
    inner = raw.get("intermediate_size") or 4 * raw["hidden_size"]
    return (2 if kind in UNGATED else 3) * raw["hidden_size"] * inner


def _experts(raw: Mapping[str, Any]) -> int:
    hidden, count = raw["hidden_size"], _num_experts(raw)
    inner = raw.get("moe_intermediate_size") or raw["intermediate_size"]
    shared = (raw.get("n_shared_experts") or 0) * inner
    shared += raw.get("shared_expert_intermediate_size") or 0
    return 3 * hidden * (count * inner + shared) + hidden * count


def _num_experts(raw: Mapping[str, Any]) -> int:
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if raw.get(key):
            return raw[key]
    return 0


def _sparse_layers(raw: Mapping[str, Any]) -> list[int]:
    if not _num_experts(raw):
        return []
    step, first = raw.get("decoder_sparse_step") or 1, raw.get("first_k_dense_replace") or 0
    dense = raw.get("mlp_only_layers") or ()
    return [
        layer
        for layer in range(raw["num_hidden_layers"])
        if layer >= first and layer not in dense and (layer + 1) % step == 0
    ]
