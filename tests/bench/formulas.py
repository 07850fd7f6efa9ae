"""The losses in plain torch under autograd: baselines in float32, dense references in float64.

Written from docs/losses.md alone; nothing here is imported from `mopd.losses`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum of KL(teacher | student) over rows of logits."""
    return F.kl_div(
        torch.log_softmax(student, -1),
        torch.log_softmax(teacher, -1),
        reduction="sum",
        log_target=True,
    )


def jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """TRL's generalized JSD, summed over rows of logits."""
    log_q, log_p = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    shares = torch.log(torch.tensor([1.0 - beta, beta], dtype=student.dtype))
    mixture = torch.logsumexp(torch.stack([log_q + shares[0], log_p + shares[1]]), dim=0)
    teacher_part = F.kl_div(mixture, log_p, reduction="sum", log_target=True)
    student_part = F.kl_div(mixture, log_q, reduction="sum", log_target=True)
    return beta * teacher_part + (1.0 - beta) * student_part


def topk_tail(student: Tensor, ids: Tensor, logprobs: Tensor, log_tail: Tensor) -> Tensor:
    """Forward KL over the listed tokens and one bin for the rest."""
    listed = torch.log_softmax(student, -1).gather(1, ids)
    rest = torch.log(-torch.expm1(torch.logsumexp(listed, -1, keepdim=True)))
    target = torch.cat([logprobs, log_tail[:, None]], 1)
    return F.kl_div(torch.cat([listed, rest], 1), target, reduction="sum", log_target=True)


def topk_renorm(student: Tensor, ids: Tensor, logprobs: Tensor, log_tail: Tensor) -> Tensor:
    """Forward KL of the listed tokens, renormalised: the full log-sum-exp cancels."""
    listed, target = torch.log_softmax(student.gather(1, ids), -1), torch.log_softmax(logprobs, -1)
    return F.kl_div(listed, target, reduction="sum", log_target=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """Teacher's bins at the boundaries."""

    position: Tensor  # [R]
    ids: Tensor  # [R, K], -1 where padded
    probs: Tensor  # [R, K]
    tail: Tensor  # [R]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """Slots of the path terms, entries as global student ids."""

    position: Tensor  # [Q]
    weight: Tensor  # [Q]
    slot_path: Tensor  # [E]
    target: Tensor  # [E]
    entry_slot: Tensor  # [F]
    entry_token: Tensor  # [F]


def _bins(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    def kl(p: Tensor, q: Tensor) -> Tensor:
        # both logarithms see a positive number: 0 log 0 has value 0 and slope 0
        safe_p, safe_q = torch.where(p > 0, p, 1.0), torch.where(p > 0, q, 1.0)
        return torch.where(p > 0, p * (safe_p.log() - safe_q.clamp_min(1e-30).log()), 0.0)

    if beta == 0.0:
        return kl(teacher, student)
    mixture = beta * teacher + (1.0 - beta) * student
    return beta * kl(teacher, mixture) + (1.0 - beta) * kl(student, mixture)


def ctkd(student: Tensor, lists: Lists, paths: Paths, weights: Tensor) -> Tensor:
    """Boundary and path terms; ``weights`` is W transposed, sparse [V_T + 1, V_S]."""
    size = weights.shape[1]
    probs = torch.softmax(student, -1)
    pushed = torch.sparse.mm(weights, probs[lists.position, :size].T).T
    listed = torch.where(lists.ids >= 0, pushed.gather(1, lists.ids.clamp_min(0)), 0.0)
    bins = torch.cat([listed, 1.0 - listed.sum(-1, keepdim=True)], 1)
    teacher = torch.cat([lists.probs, lists.tail[:, None]], 1)
    boundary = _bins(teacher, bins, 0.0).sum()
    row = paths.position[paths.slot_path[paths.entry_slot]]
    slots = torch.zeros_like(paths.target).index_add(
        0, paths.entry_slot, probs[row, paths.entry_token]
    )
    total = torch.zeros_like(paths.weight).index_add(0, paths.slot_path, slots)
    value = _bins(paths.target, slots / total[paths.slot_path], 0.0)
    return boundary + (paths.weight[paths.slot_path] * value).sum()


def dense_gold(
    student: Tensor,
    teacher: Tensor,
    common: Tensor,
    *,
    beta: float,
    weights: tuple[float, float],
    top_u: int | None,
) -> Tensor:
    """Matched divergence with a rest bin plus L1 of the sorted rest, for logits of the same rows.

    ``common`` [V_T] is the student's token for each of the teacher's, or -1.
    """
    q, p = torch.softmax(student, -1), torch.softmax(teacher, -1)
    known = common >= 0
    free_q, free_p = _uncommon(q, p, common)
    bins_q = torch.cat([q[:, common[known]], free_q.sum(-1, keepdim=True)], 1)
    bins_p = torch.cat([p[:, known], free_p.sum(-1, keepdim=True)], 1)
    divergence = _bins(bins_p, bins_q, beta).sum()
    gap = _sorted_gap(free_q, free_p, top_u).abs().sum()
    return weights[0] * divergence + weights[1] * gap


def truncation(student: Tensor, teacher: Tensor, common: Tensor, top_u: int) -> dict[str, float]:
    """What the largest ``top_u`` of each side leave out of the sorted L1, in float64.

    ``bound``: the uncommon mass behind them on both sides; ``difference``: exact less truncated.
    """
    q, p = torch.softmax(student.double(), -1), torch.softmax(teacher.double(), -1)
    free = _uncommon(q, p, common)
    bound = sum(side.sum(-1) - _largest(side, top_u).sum(-1) for side in free)
    whole, cut = (_sorted_gap(*free, u).abs().sum(-1) for u in (None, top_u))
    rows = {"bound": torch.as_tensor(bound), "difference": whole - cut}
    found = {f"mean_{name}": float(row.mean()) for name, row in rows.items()}
    return found | {f"max_{name}": float(row.max()) for name, row in rows.items()}


def _uncommon(student: Tensor, teacher: Tensor, common: Tensor) -> tuple[Tensor, Tensor]:
    is_free = torch.ones(student.shape[1], dtype=torch.bool)
    is_free[common[common >= 0]] = False
    return student[:, is_free], teacher[:, common < 0]


def _largest(values: Tensor, count: int | None) -> Tensor:
    if count is None:
        return values.sort(-1, descending=True).values
    return values.topk(min(count, values.shape[1]), dim=-1).values


def _sorted_gap(student: Tensor, teacher: Tensor, top_u: int | None) -> Tensor:
    ours, theirs = _largest(student, top_u), _largest(teacher, top_u)
    width = max(ours.shape[1], theirs.shape[1])
    return F.pad(ours, (0, width - ours.shape[1])) - F.pad(theirs, (0, width - theirs.shape[1]))
