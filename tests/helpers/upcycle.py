"""Turns a dense Qwen3 directory into a Qwen3-MoE that computes (nearly) the same function."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch


def upcycle(
    dense_dir: str | Path,
    out_dir: str | Path,
    *,
    num_experts: int = 4,
    num_experts_per_tok: int = 2,
    noise: float = 0.0,
    router_std: float = 0.02,
    router_aux_loss_coef: float = 0.01,
    seed: int = 0,
) -> Path:
    """Every expert is a copy of its layer's feed-forward part, times 1 + ``noise`` * N(0, 1).

    The weights of a token's experts sum to 1 (`norm_topk_prob`), so without noise the mixture
    computes the dense function, up to rounding. Routers are random: they send tokens to different
    experts, whose gradients then differ.

    Raises:
        ValueError: not a Qwen3ForCausalLM. Llama and Qwen2 have no norm on queries and keys, which
            Qwen3-MoE always applies: no weights make it the same function.
    """
    import transformers as tf

    dense = tf.AutoModelForCausalLM.from_pretrained(dense_dir, dtype=torch.float32)
    if not isinstance(dense, tf.Qwen3ForCausalLM):
        raise ValueError(f"{dense_dir} is a {type(dense).__name__}; only Qwen3ForCausalLM")
    kept = dense.config.to_dict()
    for key in ("architectures", "model_type", "layer_types", "max_window_layers", "dtype"):
        kept.pop(key, None)
    config = tf.Qwen3MoeConfig(
        **kept,
        moe_intermediate_size=dense.config.intermediate_size,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        norm_topk_prob=True,
        router_aux_loss_coef=router_aux_loss_coef,
        mlp_only_layers=[],
    )
    mixture = tf.Qwen3MoeForCausalLM(config)
    mixture.load_state_dict(dense.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for source, target in zip(dense.model.layers, mixture.model.layers, strict=True):
            gate_up = torch.cat([source.mlp.gate_proj.weight, source.mlp.up_proj.weight])
            _fill(target.mlp.experts.gate_up_proj, gate_up, noise, generator)
            _fill(target.mlp.experts.down_proj, source.mlp.down_proj.weight, noise, generator)
            target.mlp.gate.weight.normal_(std=router_std, generator=generator)
    mixture.generation_config = dense.generation_config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mixture.save_pretrained(out_dir)
    for path in Path(dense_dir).iterdir():  # the tokenizer's files
        if not (Path(out_dir) / path.name).exists() and path.suffix != ".safetensors":
            shutil.copyfile(path, Path(out_dir) / path.name)
    return Path(out_dir)


def _fill(
    experts: torch.Tensor, matrix: torch.Tensor, noise: float, generator: torch.Generator
) -> None:
    for expert in experts:
        expert.copy_(matrix * (1.0 + noise * torch.randn(matrix.shape, generator=generator)))
