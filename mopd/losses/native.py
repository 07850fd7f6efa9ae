"""Rows over the student's own vocabulary: no projection stands between the two sides.

What the teacher says at a student index inside a chunk arrives like this, and so do rows whose
teacher mass was already carried over to student tokens (docs/losses.md, CTKD: options).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopd.losses.base import RowBlock
from mopd.losses.divergence import Divergence
from mopd.losses.kl import support_slopes
from mopd.losses.softmax import RowGradient, rows_of
from mopd.losses.vocab import VocabShard


def add_native(
    gradient: RowGradient,
    probs: Tensor,
    rows: RowBlock,
    shard: VocabShard,
    *,
    divergence: Divergence,
) -> Tensor:
    """Adds the gradient of the block's native rows; their weighted divergences [o].

    ``probs`` [n, V_local] are those of ``gradient``, and as they were afterwards.
    """
    if len(rows.native) == 0:
        return probs.new_zeros(0)
    slopes = support_slopes(
        rows_of(probs, rows.native),
        rows.native_ids,
        torch.exp(rows.native_logprobs),
        torch.exp(rows.native_log_tail),
        divergence,
        shard=shard,
    )
    gradient.add(slopes, rows.native, rows.native_weight)
    return slopes.value * rows.native_weight
