"""Learned projections: the gradient of a projected divergence in the entries of W.

With q~_u = sum_s q_s W[s, u] and g_u = dD/dq~_u, dD/dW[s, u] = q_s g_u. Rows of W add up to 1, so
a constant per row of W changes nothing and g counts from the slope of the tail (X-Token 2605.21699
learns W with P-KL alone, learning rate 1e-2).
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from mopd.losses.base import ProjectionRows


@runtime_checkable
class LearnedRows(ProjectionRows, Protocol):
    """Rows of a projection that change while they are trained; `mopd.projection.LearnedShard`.

    `accumulate` adds d(objective)/dW [E] of the entries of columns ``ids`` [G], in the order in
    which ``columns(ids)`` lists them.
    """

    def accumulate(self, ids: Tensor, gradient: Tensor) -> None: ...


def entry_gradient(at: Tensor, excess: Tensor, weight: Tensor) -> Tensor:
    """[E] sum over rows of ``weight`` [r] times q_s (``at`` [r, E]) times g_u (``excess``)."""
    return (at * excess).mul_(weight[:, None]).sum(dim=0)
