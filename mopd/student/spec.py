"""Transformer layers in plain torch under Transformer Engine's parameter names.

Shapes follow Megatron: S sequence, B batch, H hidden, N query heads and G query groups of this
tensor-parallel rank, D head size. Activations are [S, B, ...].
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import nn

from mopd.device import get_device
from mopd.student.attention import CausalAttention
from mopd.student.moe import moe_spec


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Root-mean-square norm over the last axis, in float32 until the weight is applied."""
    wide = hidden.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(hidden.dtype)


def _norm_weight(config: TransformerConfig, hidden_size: int) -> nn.Parameter:
    device = get_device("auto").current_device()  # where megatron-core builds its own layers
    weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
    # Under sequence parallelism each rank sees a part of the sequence, so its gradient is partial;
    # Megatron sums the gradients of parameters that carry this mark.
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.epsilon = eps
        self.weight = _norm_weight(config, hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, self.weight, self.epsilon)


class NormColumnParallelLinear(ColumnParallelLinear):
    """RMS norm, then a column-parallel linear; the norm's weight is `layer_norm_weight`."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.epsilon = config.layernorm_epsilon
        self.layer_norm_weight = _norm_weight(config, input_size)

    def forward(
        self, input_: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        normed = rms_norm(input_, self.layer_norm_weight, self.epsilon)
        return super().forward(normed, *args, **kwargs)


def decoder_spec(
    config: TransformerConfig, *, pp_rank: int, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the final norm."""
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=NormColumnParallelLinear,
            core_attention=CausalAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        params={"ffn_hidden_size": config.ffn_hidden_size},
        submodules=MLPSubmodules(linear_fc1=NormColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    layers = (
        _layer_spec(attention, mlp=mlp, norm=IdentityOp),
        _layer_spec(attention, mlp=moe_spec(), norm=RMSNorm),
    )
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    # Megatron's annotations leave out the functions and classes that its own specs pass.
    return TransformerBlockSubmodules(
        layer_specs=[layers[_has_experts(config, first + local)] for local in range(num_layers)],
        layer_norm=RMSNorm,  # pyright: ignore[reportArgumentType]
    )


def _layer_spec(attention: ModuleSpec, *, mlp: ModuleSpec, norm: type) -> ModuleSpec:
    """``norm`` stands before the feed-forward part, where that has none of its own."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
        ),
    )


def _has_experts(config: TransformerConfig, layer: int) -> bool:
    if config.num_moe_experts is None:
        return False
    assert isinstance(config.moe_layer_freq, list)  # `moe_options`
    return bool(config.moe_layer_freq[layer])
