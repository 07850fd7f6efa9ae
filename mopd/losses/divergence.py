"""Divergences over bins, row by row, and their derivatives.

P is the teacher, Q the student; both are [r, B] probabilities of the same bins, bins with 0 on both
sides count nothing. Sources: GKD 2306.13649 (JSD with TRL's ``beta``), skew KL 2402.03898,
AKL 2404.02657.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TINY = 1e-30  # below any fp32 probability that matters; keeps logarithms finite

Kind = Literal[
    "forward_kl", "reverse_kl", "jsd", "mixed", "skew_kl", "skew_reverse_kl", "akl", "tvd"
]
TopKMode = Literal["tail", "genkl", "renorm", "trunc"]
Pair = tuple[Tensor, Tensor]  # contributions [r, B] that add up to the divergence, and dD/dQ


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """A divergence with its parameters, and what it does with the mass outside a top-k support.

    ``kind``:
        forward_kl       KL(P | Q)
        reverse_kl       KL(Q | P)
        jsd              beta KL(P|M) + (1 - beta) KL(Q|M), M = beta P + (1 - beta) Q; 0 and 1 are
                         forward and reverse KL by definition, not by continuity
        mixed            weight KL(P | Q) + (1 - weight) KL(Q | P)
        skew_kl          KL(P | skew P + (1 - skew) Q)
        skew_reverse_kl  KL(Q | skew Q + (1 - skew) P)
        akl              forward and reverse KL weighed by the gap |P - Q| over the head and the
                         tail of P; the tail is the least likely mass up to ``alpha``
        tvd              half of sum |P - Q|
    ``top_k_mode``:
        tail             one more bin for everything outside (a lower bound of the full divergence)
        genkl            no bin; forward or reverse KL plus sum(Q - P) or sum(P - Q)
        renorm           both sides renormalised inside: no gradient outside
        trunc            the bare sum inside; may be negative, kept for comparison
    """

    kind: Kind
    beta: float = 0.5
    weight: float = 0.5
    skew: float = 0.1
    alpha: float = 0.5
    top_k_mode: TopKMode = "tail"

    def bins(self, teacher: Tensor, student: Tensor) -> Pair:
        """Contributions and slopes over bins that hold all the mass."""
        match self.kind:
            case "forward_kl":
                return _forward(teacher, student)
            case "reverse_kl":
                return _reverse(teacher, student)
            case "jsd":
                return _jsd(teacher, student, self.beta)
            case "mixed":
                return _mix(teacher, student, self.weight)
            case "skew_kl":
                return _skew(teacher, student, self.skew)
            case "skew_reverse_kl":
                return _skew_reverse(teacher, student, self.skew)
            case "akl":
                return _mix(teacher, student, _head_share(teacher, student, self.alpha))
            case "tvd":
                return 0.5 * (teacher - student).abs(), 0.5 * torch.sign(student - teacher)

    def support(
        self, teacher: Tensor, student: Tensor, *, teacher_rest: Tensor, student_rest: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """On a support [r, K] with the mass outside it [r, 1].

        Returns the value [r], the slope in each student probability [r, K] and the slope in the
        student's mass outside [r, 1].
        """
        none = torch.zeros_like(student_rest)
        match self.top_k_mode:
            case "tail":
                value, slope = self.bins(
                    torch.cat([teacher, teacher_rest], dim=1),
                    torch.cat([student, student_rest], dim=1),
                )
                return value.sum(dim=1), slope[:, :-1], slope[:, -1:]
            case "trunc":
                value, slope = self.bins(teacher, student)
                return value.sum(dim=1), slope, none
            case "genkl":
                return (*_generalized(self.kind, teacher, student), none)
            case "renorm":
                inside = student.sum(dim=1, keepdim=True).clamp_min(TINY)
                listed = teacher.sum(dim=1, keepdim=True).clamp_min(TINY)
                value, slope = self.bins(teacher / listed, student / inside)
                mean = (student / inside * slope).sum(dim=1, keepdim=True)
                return value.sum(dim=1), (slope - mean) / inside, none


def _log(values: Tensor) -> Tensor:
    return torch.log(values.clamp_min(TINY))


def _forward(teacher: Tensor, student: Tensor) -> Pair:
    return teacher * (_log(teacher) - _log(student)), -teacher / student.clamp_min(TINY)


def _reverse(teacher: Tensor, student: Tensor) -> Pair:
    ratio = _log(student) - _log(teacher)
    # the 1 cancels in a softmax but keeps the formula exact
    return student * ratio, ratio + 1.0


def _jsd(teacher: Tensor, student: Tensor, beta: float) -> Pair:
    if beta == 0.0:
        return _forward(teacher, student)
    if beta == 1.0:
        return _reverse(teacher, student)
    mixture = _log(beta * teacher + (1.0 - beta) * student)
    log_student = _log(student)
    value = beta * teacher * (_log(teacher) - mixture)
    value = value + (1.0 - beta) * student * (log_student - mixture)
    return value, (1.0 - beta) * (log_student - mixture)


def _mix(teacher: Tensor, student: Tensor, weight: float | Tensor) -> Pair:
    (forward, forward_slope), (reverse, reverse_slope) = (
        _forward(teacher, student),
        _reverse(teacher, student),
    )
    rest = 1.0 - weight
    return weight * forward + rest * reverse, weight * forward_slope + rest * reverse_slope


def _skew(teacher: Tensor, student: Tensor, skew: float) -> Pair:
    mixture = skew * teacher + (1.0 - skew) * student
    value = teacher * (_log(teacher) - _log(mixture))
    return value, -(1.0 - skew) * teacher / mixture.clamp_min(TINY)


def _skew_reverse(teacher: Tensor, student: Tensor, skew: float) -> Pair:
    mixture = skew * student + (1.0 - skew) * teacher
    ratio = _log(student) - _log(mixture)
    return student * ratio, ratio + 1.0 - skew * student / mixture.clamp_min(TINY)


def _head_share(teacher: Tensor, student: Tensor, alpha: float) -> Tensor:
    """AKL's weight of the forward KL [r, 1]: the gap over the head, detached."""
    ordered, order = torch.sort(teacher.detach(), dim=1)
    in_tail = torch.cumsum(ordered, dim=1) <= alpha
    gap = (teacher - student).detach().abs()
    tail = (gap.gather(1, order) * in_tail).sum(dim=1, keepdim=True)
    total = gap.sum(dim=1, keepdim=True)
    return torch.where(total > 0, (total - tail) / total.clamp_min(TINY), 0.5)


def _generalized(kind: Kind, teacher: Tensor, student: Tensor) -> Pair:
    """KL of measures that need not add up to 1; zero only where they are equal."""
    if kind == "forward_kl":
        value, slope = _forward(teacher, student)
        return (value + student - teacher).sum(dim=1), slope + (student > 0).to(slope.dtype)
    if kind == "reverse_kl":
        value, slope = _reverse(teacher, student)
        return (value + teacher - student).sum(dim=1), slope - 1.0
    raise ValueError(f"top_k_mode genkl is defined for forward_kl and reverse_kl, not {kind}")
