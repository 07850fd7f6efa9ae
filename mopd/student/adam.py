"""Adam with decoupled weight decay (AdamW, 1711.05101), its step counted per parameter group.

torch's AdamW counts steps in a tensor per parameter, which Megatron's distributed optimizer and
resharding do not expect. The fused Adams of Transformer Engine and Apex count as here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Adam(torch.optim.Optimizer):
    """State per parameter: ``exp_avg`` and ``exp_avg_sq``, of its shape and type.

    The arithmetic is that of `torch.optim.AdamW`, operation by operation.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool,
    ) -> None:
        assert adam_w_mode, "weight decay inside the gradient is not implemented"
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "step": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            # Also where this rank holds no part of the group: the count is the whole model's.
            group["step"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(
        self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        (beta1, beta2), step = group["betas"], group["step"]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = group["lr"] / (1 - beta1**step)
        spread = (square.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
        parameter.addcdiv_(mean, spread, value=-size)
