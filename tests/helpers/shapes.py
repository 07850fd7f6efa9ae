"""Shapes of models without files."""

from __future__ import annotations

from mopd.config.model_shape import ModelShape

QWEN3 = ModelShape(
    architecture="Qwen3ForCausalLM",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=32,
    vocab_size=67,
    max_position_embeddings=512,
    norm_epsilon=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    qkv_bias=False,
    qk_norm=True,
    tied=True,
)
