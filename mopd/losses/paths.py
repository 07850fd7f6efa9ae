"""Path terms of CTKD: what the teacher says about tokens that begin with the same piece.

Each path row carries slots, groups of the student's own tokens, with a distribution R over them
(docs/losses.md, path terms). The term is the divergence of R from the student's probabilities,
added up by slot and renormalised over the slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopd.losses.base import RowBlock, zero
from mopd.losses.divergence import Divergence
from mopd.losses.softmax import RowGradient
from mopd.losses.vocab import VocabShard


def add_paths(
    gradient: RowGradient,
    logits: Tensor,
    rows: RowBlock,
    shard: VocabShard,
    *,
    divergence: Divergence,
    temperature: float,
) -> Tensor:
    """Adds the gradient in ``logits / temperature`` [n, V_local]; the weighted sum of the rows."""
    num_paths = len(rows.path_weight)
    if num_paths == 0:
        return zero(logits)
    path_of_entry = rows.slot_path[rows.entry_slot]
    score = logits[rows.entry_row, rows.entry_token] / temperature
    peak = logits.new_full((num_paths,), float("-inf"))
    peak.scatter_reduce_(0, path_of_entry, score, reduce="amax")
    peak = shard.max(peak)
    mass = torch.exp(score - peak[path_of_entry])
    slots = shard.sum(torch.zeros_like(rows.slot_target).index_add_(0, rows.entry_slot, mass))
    total = torch.zeros_like(peak).index_add_(0, rows.slot_path, slots)
    student = slots / total[rows.slot_path]
    value, slope = _slot_divergence(rows, student, divergence)
    mean = torch.zeros_like(peak).index_add_(
        0, rows.slot_path, torch.where(student > 0, student * slope, 0.0)
    )
    conditional = rows.path_weight[path_of_entry] * mass / total[path_of_entry]
    amount = conditional * (slope[rows.entry_slot] - mean[path_of_entry])
    gradient.add_points(rows.entry_row, rows.entry_token, amount)
    return (rows.path_weight[rows.slot_path] * value).sum()


def _slot_divergence(
    rows: RowBlock, student: Tensor, divergence: Divergence
) -> tuple[Tensor, Tensor]:
    """Contributions and slopes [s] of ragged rows of slots, laid out as padded rows."""
    counts = torch.bincount(rows.slot_path, minlength=len(rows.path_weight))
    first = torch.cumsum(counts, 0) - counts
    place = torch.arange(len(student), device=student.device) - first[rows.slot_path]
    where = (rows.slot_path, place)
    shape = (len(counts), int(counts.max()))
    value, slope = divergence.bins(
        student.new_zeros(shape).index_put_(where, rows.slot_target),
        student.new_zeros(shape).index_put_(where, student),
    )
    return value[where], slope[where]
