"""A layer's experts under their Hugging Face names: one by one, or all in one tensor.

Published models, `save_pretrained`, vLLM and mopd name every expert's matrices. transformers keeps
them in `experts.gate_up_proj` [E, 2 * I, H] and `experts.down_proj` [E, H, I] in memory, and on
disk with `save_original_format=False`. E experts, I their feed-forward size, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import Tensor

_EXPERT = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")
_FUSED = re.compile(r"(.*\.mlp\.experts\.)(gate_up|down)_proj")


def in_fused(
    name: str, size: tuple[int, ...], index: tuple[slice, ...], *, num_experts: int
) -> tuple[str, tuple[int, ...], tuple[int | slice, ...]] | None:
    """Where the fused layout keeps `name[index]`: name, shape and index; None if not an expert's.

    Args:
        size: the shape of the expert's own matrix.
    """
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None
    prefix, expert, part = match[1], int(match[2]), match[3]
    if part == "down":
        return prefix + "down_proj", (num_experts, *size), (expert, *index)
    rows, columns = size
    start, stop, _ = index[0].indices(rows)
    offset = rows if part == "up" else 0
    moved = slice(start + offset, stop + offset)
    return prefix + "gate_up_proj", (num_experts, 2 * rows, columns), (expert, moved, *index[1:])


def one_by_one(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """``named`` with views of single experts in place of fused tensors."""
    for name, tensor in named:
        match = _FUSED.fullmatch(name)
        if match is None:
            yield name, tensor
            continue
        for expert, matrix in enumerate(tensor):
            own = f"{match[1]}{expert}."
            if match[2] == "down":
                yield own + "down_proj.weight", matrix
            else:
                gate, up = matrix.chunk(2)
                yield own + "gate_proj.weight", gate
                yield own + "up_proj.weight", up
