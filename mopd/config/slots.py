"""Which Hugging Face tensors each Megatron parameter is made of.

H hidden, D head size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mopd.config.model_shape import ModelShape

# rows: split along axis 0. columns: along axis 1. vocab: rows with padding at the end.
# qkv: query groups, each its queries, key, value. gate_up: every rank's gate rows, then up rows.
Kind = Literal["rows", "columns", "vocab", "whole", "qkv", "gate_up"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One Megatron parameter of one pipeline rank."""

    stage: int  # the pipeline rank
    parameter: str  # `parameter_name`
    tensors: tuple[str, ...]  # Hugging Face names
    sizes: tuple[tuple[int, ...], ...]  # their shapes
    kind: Kind
    exported: bool = True  # False for the last stage's copy of a tied embedding
    ep_rank: int | None = None  # the expert-parallel rank that has it; None: all have it


def parameter_name(chunk: int, name: str) -> str:
    """Of a parameter in stage ``chunk`` of its pipeline rank: stages of one rank share names."""
    return f"{chunk}.{name}"


def build_slots(
    shape: ModelShape, *, pp_size: int, vp_size: int = 1, ep_size: int = 1
) -> tuple[Slot, ...]:
    """All parameters of all stages, in the order in which weights are exported."""
    hidden = shape.hidden_size
    first, last = (0, 0), (pp_size - 1, vp_size - 1)
    vocab = (shape.vocab_size, hidden)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    slots = [_slot(first, "embedding.word_embeddings.weight", "vocab", {embedding: vocab})]
    per_stage = shape.num_layers // (pp_size * vp_size)
    for layer in range(shape.num_layers):
        stage, local = divmod(layer, per_stage)
        chunk, rank = divmod(stage, pp_size)
        place = (rank, chunk)
        slots += _layer_slots(shape, place=place, layer=layer, local=local, ep_size=ep_size)
    slots.append(
        _slot(last, "decoder.final_layernorm.weight", "whole", {"model.norm.weight": (hidden,)})
    )
    if not shape.tied:
        slots.append(_slot(last, "output_layer.weight", "vocab", {head: vocab}))
    elif last != first:
        slots.append(
            _slot(last, "output_layer.weight", "vocab", {embedding: vocab}, exported=False)
        )
    return tuple(slots)


def _slot(
    place: tuple[int, int],
    parameter: str,
    kind: Kind,
    tensors: dict[str, tuple[int, ...]],
    *,
    exported: bool = True,
    ep_rank: int | None = None,
) -> Slot:
    return Slot(
        stage=place[0],
        parameter=parameter_name(place[1], parameter),
        tensors=tuple(tensors),
        sizes=tuple(tensors.values()),
        kind=kind,
        exported=exported,
        ep_rank=ep_rank,
    )


def _layer_slots(
    shape: ModelShape, *, place: tuple[int, int], layer: int, local: int, ep_size: int
) -> list[Slot]:
    theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{local}."
    hidden, head = shape.hidden_size, shape.head_dim
    heads, groups = shape.num_attention_heads * head, shape.num_query_groups * head
    rows = {"q": heads, "k": groups, "v": groups}
    attention = ours + "self_attention."

    def make(parameter: str, kind: Kind, tensors: dict[str, tuple[int, ...]]) -> Slot:
        return _slot(place, parameter, kind, {theirs + n: size for n, size in tensors.items()})

    weights = {f"self_attn.{n}_proj.weight": (size, hidden) for n, size in rows.items()}
    biases = {f"self_attn.{n}_proj.bias": (size,) for n, size in rows.items()}
    slots = [
        make(
            attention + "linear_qkv.layer_norm_weight",
            "whole",
            {"input_layernorm.weight": (hidden,)},
        ),
        make(attention + "linear_qkv.weight", "qkv", weights),
    ]
    if shape.qkv_bias:
        slots.append(make(attention + "linear_qkv.bias", "qkv", biases))
    if shape.qk_norm:
        slots += [
            make(
                f"{attention}{n}_layernorm.weight", "whole", {f"self_attn.{n}_norm.weight": (head,)}
            )
            for n in ("q", "k")
        ]
    return [
        *slots,
        make(
            attention + "linear_proj.weight",
            "columns",
            {"self_attn.o_proj.weight": (hidden, heads)},
        ),
        *_mlp_slots(shape, place=place, layer=layer, local=local, ep_size=ep_size),
    ]


def _mlp_slots(
    shape: ModelShape, *, place: tuple[int, int], layer: int, local: int, ep_size: int
) -> list[Slot]:
    theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{local}."
    hidden, moe = shape.hidden_size, shape.moe
    norm = {theirs + "post_attention_layernorm.weight": (hidden,)}

    def feed_forward(mine: str, name: str, ffn: int, ep_rank: int | None = None) -> list[Slot]:
        first = {f"{theirs}{name}{part}_proj.weight": (ffn, hidden) for part in ("gate", "up")}
        second: dict[str, tuple[int, ...]] = {f"{theirs}{name}down_proj.weight": (hidden, ffn)}
        return [
            _slot(place, f"{mine}linear_fc1.weight", "gate_up", {**first}, ep_rank=ep_rank),
            _slot(place, f"{mine}linear_fc2.weight", "columns", second, ep_rank=ep_rank),
        ]

    if moe is None or layer not in moe.layers:
        norm_slot = _slot(place, ours + "mlp.linear_fc1.layer_norm_weight", "whole", {**norm})
        return [norm_slot, *feed_forward(ours + "mlp.", "mlp.", shape.ffn_hidden_size)]
    gate = {theirs + "mlp.gate.weight": (moe.num_experts, hidden)}
    slots = [
        _slot(place, ours + "pre_mlp_layernorm.weight", "whole", {**norm}),
        _slot(place, ours + "mlp.router.weight", "whole", {**gate}),
    ]
    for expert in range(moe.num_experts):
        owner, position = divmod(expert, moe.num_experts // ep_size)
        mine = f"{ours}mlp.experts.local_experts.{position}."
        slots += feed_forward(mine, f"mlp.experts.{expert}.", moe.ffn_hidden_size, ep_rank=owner)
    return slots
