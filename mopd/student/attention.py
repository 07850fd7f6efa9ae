"""Causal attention in plain torch: padded rows, packed texts, context-parallel parts of texts.

S sequence, T packed tokens, B batch, N query heads and G query groups of this tensor-parallel rank,
D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.nn.attention.bias import causal_lower_right


@dataclass
class PackedTexts(PackedSeqParams):
    """Megatron's description of a packed row, and what the host knows of it already."""

    offsets: tuple[int, ...] = ()  # of the whole row's texts, ends with its length
    natural: torch.Tensor | None = None  # [T * cp] place in the gathered row; None without cp


class CausalAttention(nn.Module):
    """Causal softmax attention with grouped queries through torch's fused kernel.

    Padding is behind its text, where causality already hides it from every real token: no mask.
    Under context parallelism each rank has two pieces of each text, gathers keys and values of all
    (as Llama 3's training did, 2407.21783, 3.3.2) and sends their gradients back.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        del layer_number, cp_comm_type
        assert attention_type == "self" and attn_mask_type == AttnMaskType.causal
        assert pg_collection is not None
        self.softmax_scale = softmax_scale
        # Megatron counts the tokens to the left of a query, and not the query itself.
        self.window = config.window_size[0] + 1 if config.window_size is not None else None
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,  # [S, B, N, D], packed [T, N, D]
        key: torch.Tensor,  # [S, B, G, D], packed [T, G, D]
        value: torch.Tensor,  # [S, B, G, D], packed [T, G, D]
        attention_mask: torch.Tensor | None,
        /,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **options: Any,
    ) -> torch.Tensor:  # [S, B, N * D], packed [T, N * D]
        assert attention_mask is None
        if packed_seq_params is None:
            attended = self._attend(
                query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
            )
            return attended.permute(2, 0, 1, 3).flatten(2)
        assert isinstance(packed_seq_params, PackedTexts)
        return self._packed(query, key, value, packed_seq_params).flatten(1)

    def _packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, texts: PackedTexts
    ) -> torch.Tensor:
        """[T, N, D]: text by text, so that the cost is the sum of the squares."""
        rank, size = 0, 1
        if texts.natural is not None:
            rank, size = self.cp_group.rank(), self.cp_group.size()
            both = torch.stack([key, value], dim=1)
            both = gather_from_sequence_parallel_region(both, group=self.cp_group)
            key, value = both.index_select(0, texts.natural).unbind(1)
        # [1, heads, T, D]
        query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))
        parts, done = [], 0
        for start, end in pairwise(texts.offsets):
            for piece, stop in _pieces(end - start, rank, size):
                parts.append(
                    self._attend(
                        query[:, :, done : done + piece],
                        key[:, :, start : start + stop],
                        value[:, :, start : start + stop],
                    )
                )
                done += piece
        return torch.cat(parts, dim=2)[0].transpose(0, 1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[B, N, Q, D]: the queries are the last Q positions of the K keys, [B, G, K, D]."""
        queries, keys = query.shape[2], key.shape[2]
        mask = None
        if self.window is not None and keys > self.window:
            mask = _window(queries, keys, self.window, query.device)
        elif queries != keys:
            mask = causal_lower_right(queries, keys)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )


def _pieces(length: int, rank: int, size: int) -> list[tuple[int, int]]:
    """(queries, end of the text that they see) of a context rank's two pieces of a text."""
    if size == 1:
        return [(length, length)]
    piece = length // (2 * size)
    return [(piece, (rank + 1) * piece), (piece, (2 * size - rank) * piece)]


def _window(queries: int, keys: int, window: int, device: torch.device) -> torch.Tensor:
    """[Q, K] bool: a query sees itself and the ``window - 1`` tokens before it."""
    sees = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return sees.tril(keys - queries).triu(keys - queries - window + 1)
