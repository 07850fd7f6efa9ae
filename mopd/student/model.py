"""The student as Megatron's GPTModel, one pipeline stage per rank, with weights from disk."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
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
from torch import nn

from mopd.config.model_shape import Llama3Rope, ModelShape, read_model_config
from mopd.config.schema import RunSection, StudentSection
from mopd.config.slots import build_slots, parameter_name
from mopd.student import output
from mopd.student.hf_io import load_hf
from mopd.student.lora import Adapters
from mopd.student.moe import moe_options, set_dispatcher
from mopd.student.parallel import Topology
from mopd.student.spec import decoder_spec
from mopd.student.trainable import choose_trainable, frozen_parameters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentModel:
    """One rank's stages. Logits of the last one are [B, L, padded_vocab_size / tp_size].

    Stage v of ``chunks`` is stage v * pp_size + pp_rank of the whole model. Within
    `mopd.student.output.hidden_output` the last gives hidden states [B, L, H] in place of logits.
    Columns from `vocab_size` on belong to no token: their weights are zero and losses mask them.
    A model that does not learn (`mopd.student.frozen`) has no ``ddp``.
    """

    shape: ModelShape
    topology: Topology
    config: TransformerConfig
    chunks: tuple[GPTModel, ...]
    ddp: tuple[DistributedDataParallel, ...]
    vocab_size: int
    padded_vocab_size: int
    dtype: torch.dtype
    source_dir: Path
    adapters: Adapters | None

    @property
    def head(self) -> GPTModel:
        """The stage with the output layer; on ranks of earlier stages one without."""
        return self.chunks[-1]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Of all stages, under `parameter_name`."""
        for index, chunk in enumerate(self.chunks):
            for name, parameter in chunk.named_parameters():
                yield parameter_name(index, name), parameter

    def merged(self, name: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """A Hugging Face ``tensor`` of this stage with its adapter, if any is on, added to it.

        Collective over the tensor-parallel ranks, where `hf_io.gather_shards` leaves None on some.
        """
        adapters = self.adapters
        if adapters is None or not adapters.enabled or name not in adapters.pairs:
            return tensor
        pair = adapters.pairs[name]
        return pair.merge(tensor, scale=adapters.scale, topology=self.topology)


def build_student(
    section: StudentSection, *, topology: Topology, seed: int = RunSection().seed
) -> StudentModel:
    """Build this rank's stages and read their weights from a Hugging Face directory.

    ``seed`` is that of fresh adapters. Collective over all ranks. Raises ConfigError for a model
    that is not supported, and for adapters and frozen names that do not fit it.
    """
    model_dir = str(section.model)
    shape = read_model_config(model_dir)
    slots = build_slots(
        shape, pp_size=topology.pp_size, vp_size=topology.vp_size, ep_size=topology.ep_size
    )
    frozen_parameters(section.freeze, slots)  # a wrong pattern is told before weights are read
    padded_vocab_size = padded_size(shape, topology)
    config = transformer_config(shape, section, topology)
    chunks = tuple(
        build_chunk(config, shape, topology, index=index, padded_vocab_size=padded_vocab_size)
        for index in range(topology.vp_size)
    )
    load_hf(chunks, model_dir, shape=shape, topology=topology)
    adapters = choose_trainable(
        chunks, section, shape=shape, slots=slots, topology=topology, seed=seed
    )
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=section.optimizer.use_distributed_optimizer,
    )
    ddp = tuple(DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks)
    config.finalize_model_grads_func = finalize_model_grads
    return StudentModel(
        shape=shape,
        topology=topology,
        config=config,
        chunks=chunks,
        ddp=ddp,
        vocab_size=shape.vocab_size,
        padded_vocab_size=padded_vocab_size,
        dtype=config.params_dtype,
        source_dir=Path(model_dir),
        adapters=adapters,
    )


def padded_size(shape: ModelShape, topology: Topology) -> int:
    """Columns of the logits, so that every tensor-parallel rank has as many."""
    return math.ceil(shape.vocab_size / topology.tp_size) * topology.tp_size


def build_chunk(
    config: TransformerConfig,
    shape: ModelShape,
    topology: Topology,
    *,
    index: int,
    padded_vocab_size: int,
) -> GPTModel:
    """Stage ``index`` of this pipeline rank, with whatever weights its memory holds."""
    first = topology.is_first_stage and index == 0
    last = topology.is_last_stage and index == topology.vp_size - 1
    stage = index if topology.vp_size > 1 else None
    gpt = GPTModel(
        config,
        decoder_spec(config, pp_rank=topology.pp_rank, vp_stage=stage),  # pyright: ignore[reportArgumentType]
        vocab_size=padded_vocab_size,
        max_sequence_length=shape.max_position_embeddings,
        pre_process=first,
        post_process=last,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        vp_stage=stage,
    )
    output.install(gpt, topology.cp_group)
    _set_rotary_frequencies(gpt, shape, topology.device)
    _mark_shards(gpt)
    return gpt


def transformer_config(
    shape: ModelShape, section: StudentSection, topology: Topology
) -> TransformerConfig:
    """Megatron's view of ``shape`` in this layout."""
    with warnings.catch_warnings():
        # of recompute_granularity=selective, where Transformer Engine's attention is fused
        warnings.filterwarnings("ignore", "If you are using transformer_engine")
        config = _megatron_config(shape, section, topology)
    set_dispatcher(config, topology.device)
    return config


def _megatron_config(
    shape: ModelShape, section: StudentSection, topology: Topology
) -> TransformerConfig:
    dtype, recompute = DTYPES[section.dtype], section.recompute
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
        transformer_impl="local",
        # Stages tell each other each shape; interleaved ones get one shape a step instead: between
        # two ranks Megatron's shapes of activations and gradients would cross.
        variable_seq_lengths=topology.pp_size > 1 and topology.vp_size == 1,
        overlap_p2p_comm=topology.vp_size > 1,  # sends and receives in an order of their own
        batch_p2p_comm=topology.vp_size == 1,
        moe_token_dispatcher_type="alltoall",  # variable shapes ask for it, without experts too
        # as Transformer Engine counts: the tokens before a token, and those behind it
        window_size=(shape.sliding_window - 1, 0) if shape.sliding_window else None,
        cuda_graph_scope=[],  # the default is a deprecated spelling of the same
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=topology.tp_size,
        pipeline_model_parallel_size=topology.pp_size,
        virtual_pipeline_model_parallel_size=topology.vp_size if topology.vp_size > 1 else None,
        context_parallel_size=topology.cp_size,
        expert_model_parallel_size=topology.ep_size,
        sequence_parallel=section.parallel.sequence_parallel and topology.tp_size > 1,
        recompute_granularity=recompute.granularity,
        recompute_method=recompute.method if recompute.granularity == "full" else None,
        recompute_num_layers=recompute.num_layers if recompute.granularity == "full" else None,
        **moe_options(shape, section.moe_aux_loss_coeff),
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
