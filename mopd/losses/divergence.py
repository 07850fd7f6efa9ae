"""Divergences over bins and their derivatives, bin by bin.

P is the teacher, Q the student; both are probabilities of the same bins. ``beta`` has TRL's
meaning (GKD 2306.13649): 0 forward KL(P|Q), 1 reverse KL(Q|P), between them the generalized JSD
beta KL(P|M) + (1 - beta) KL(Q|M) with M = beta P + (1 - beta) Q, which is not continuous at the
ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-30  # below any fp32 probability that matters; keeps logarithms finite


def bin_divergence(teacher: Tensor, student: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Contributions d (they sum to the divergence) and dD/dQ, elementwise. Any shape."""
    log_teacher = torch.log(teacher.clamp_min(TINY))
    log_student = torch.log(student.clamp_min(TINY))
    if beta == 0.0:
        value = teacher * (log_teacher - log_student)
        return value, -teacher / student.clamp_min(TINY)
    if beta == 1.0:
        # d(Q log Q/P)/dQ; the constant 1 cancels in a softmax but keeps the formula exact
        return student * (log_student - log_teacher), log_student - log_teacher + 1.0
    mixture = torch.log((beta * teacher + (1.0 - beta) * student).clamp_min(TINY))
    value = beta * teacher * (log_teacher - mixture)
    value = value + (1.0 - beta) * student * (log_student - mixture)
    return value, (1.0 - beta) * (log_student - mixture)


def softmax_backward(probabilities: Tensor, slope: Tensor, mean: Tensor) -> Tensor:
    """d/d(logits) of a function with dD/dq_s = slope [n, V_local]; mean [n] = sum_s q_s slope_s."""
    return probabilities * (slope - mean[:, None])
