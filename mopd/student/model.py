"""The student as Megatron's GPTModel, one pipeline stage per rank, with weights from disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from mopd.config.model_shape import Llama3Rope, ModelShape, read_model_config
from mopd.student import output
from mopd.student.hf_io import load_hf
from mopd.student.parallel import Topology
from mopd.student.spec import decoder_spec


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentModel:
    """One rank's stage. Logits of the last stage are [B, L, padded_vocab_size / tp_size].

    Within `mopd.student.output.hidden_output` it gives hidden states [B, L, H] in their place.
    Columns from `vocab_size` on belong to no token: their weights are zero and losses mask them.
    """

    shape: ModelShape
    topology: Topology
    config: TransformerConfig
    gpt: GPTModel
    ddp: DistributedDataParallel
    vocab_size: int
    padded_vocab_size: int
    dtype: torch.dtype
    source_dir: Path


def build_student(
    model_dir: str | Path,
    *,
    topology: Topology,
    dtype: torch.dtype,
    sequence_parallel: bool = False,
) -> StudentModel:
    """Build this rank's stage and read its weights from a Hugging Face directory.

    Collective over all ranks. Raises ConfigError for a model that is not supported.
    """
    shape = read_model_config(model_dir)
    padded_vocab_size = math.ceil(shape.vocab_size / topology.tp_size) * topology.tp_size
    config = _transformer_config(shape, topology, dtype, sequence_parallel)
    gpt = GPTModel(
        config,
        decoder_spec(config, pp_rank=topology.pp_rank),  # pyright: ignore[reportArgumentType]
        vocab_size=padded_vocab_size,
        max_sequence_length=shape.max_position_embeddings,
        pre_process=topology.is_first_stage,
        post_process=topology.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
    )
    output.install(gpt)
    _set_rotary_frequencies(gpt, shape, topology.device)
    _mark_shards(gpt)
    load_hf(gpt, model_dir, shape=shape, topology=topology)
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False),
        gpt,
    )
    config.finalize_model_grads_func = finalize_model_grads
    return StudentModel(
        shape=shape,
        topology=topology,
        config=config,
        gpt=gpt,
        ddp=ddp,
        vocab_size=shape.vocab_size,
        padded_vocab_size=padded_vocab_size,
        dtype=dtype,
        source_dir=Path(model_dir),
    )


def _transformer_config(
    shape: ModelShape, topology: Topology, dtype: torch.dtype, sequence_parallel: bool
) -> TransformerConfig:
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        layernorm_epsilon=shape.norm_epsilon,
        normalization="RMSNorm",
        qk_layernorm=shape.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Unfused elementwise ops: Megatron compiles the fused ones at first use.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        deterministic_mode=True,
        # The gradient is a sum over tokens that Megatron divides once, by the global token count.
        calculate_per_token_loss=True,
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        variable_seq_lengths=topology.pp_size > 1,  # stages tell each other each shape
        moe_token_dispatcher_type="alltoall",  # no experts here, but the line above asks for it
        cuda_graph_scope=[],  # the default is a deprecated spelling of the same
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=topology.tp_size,
        pipeline_model_parallel_size=topology.pp_size,
        context_parallel_size=topology.cp_size,
        sequence_parallel=sequence_parallel and topology.tp_size > 1,
    )


def _mark_shards(gpt: GPTModel) -> None:
    """Tell Megatron which weights are shards; only its own initialization would do so.

    Without the mark the gradient norm would count the shards of tensor-parallel rank 0 alone.
    """
    for module in gpt.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            dim = 0
        elif isinstance(module, RowParallelLinear):
            dim = 1
        else:
            continue
        if module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def _set_rotary_frequencies(gpt: GPTModel, shape: ModelShape, device: torch.device) -> None:
    """Replace Megatron's frequencies, whose Llama 3 scaling has fixed constants."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / (shape.rope_theta ** (exponents / shape.head_dim))
    if shape.rope_scaling is not None:
        frequencies = _llama3_frequencies(frequencies, shape.rope_scaling)
    gpt.rotary_pos_emb.inv_freq = frequencies


def _llama3_frequencies(frequencies: torch.Tensor, rope: Llama3Rope) -> torch.Tensor:
    """Slow frequencies are divided by `factor`, fast ones kept, those between interpolated."""
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    share_kept = ((turns - rope.low_freq_factor) / span).clamp(0.0, 1.0)
    return (1 - share_kept) * frequencies / rope.factor + share_kept * frequencies
