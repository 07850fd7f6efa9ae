"""Student probabilities of a block, and gradients that are dense only where they must be.

With dD/dq_s = rest + c_s, and c_s nonzero for a few columns, the gradient in the logits is
q_s (rest - mean) + q_s c_s: one pass over the vocabulary, and a few entries added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopd.losses.base import RowBlock
from mopd.losses.vocab import VocabShard


def boundary_probs(logits: Tensor, rows: RowBlock, shard: VocabShard) -> Tensor:
    """[r, V_local] softmax of the boundary rows of ``logits`` [n, V_local], in its own buffer."""
    at = logits if _all_rows(logits, rows) else logits[rows.boundary]
    log_probs, _ = shard.log_softmax(at)
    return log_probs.exp_()


def spread(gradient: Tensor, logits: Tensor, rows: RowBlock) -> Tensor:
    """``gradient`` [r, V_local] of the boundary rows as the gradient of all rows [n, V_local]."""
    if _all_rows(logits, rows):
        return gradient
    return torch.zeros_like(logits).index_copy_(0, rows.boundary, gradient)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """``logits / temperature``, without a copy at 1."""
    return logits if temperature == 1.0 else logits / temperature


def rescale(gradient: Tensor, temperature: float, value_scale: float) -> None:
    """In place, from d/d(logits / T) to d/d(logits) of ``value_scale`` times the value.

    A scale of T^2 keeps the gradient's size (1503.02531); one 1 / T is the chain rule's.
    """
    if value_scale != temperature:
        gradient *= value_scale / temperature


def mean_slope(student: Tensor, support_slope: Tensor, rest: Tensor) -> Tensor:
    """[r] the slope's mean under the student's bins; bins it gives nothing count nothing."""
    slopes = torch.cat([support_slope, rest], dim=1)
    return torch.where(student > 0, student * slopes, 0.0).sum(dim=-1)


def _all_rows(logits: Tensor, rows: RowBlock) -> bool:
    return len(rows.boundary) == len(logits)  # both are sorted and without repeats
