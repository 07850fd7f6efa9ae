"""Divergence of two vocabularies on the tokens they have in common, one to one.

What both have is matched, id by id; all else is one more bin on each side, or (as in the peers)
left out. A teacher's list restricts it to what is listed; a dense teacher gives every common token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mopd.losses.divergence import TINY, Divergence
from mopd.losses.softmax import Slopes
from mopd.losses.vocab import VocabShard

FLOOR = 1e-8  # TRL's lower limit of both probabilities where there is no rest bin
LOG_TINY = math.log(TINY)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonTokens:
    """Which of a shard's columns have a partner, and which do not; int64, students ascending."""

    student: Tensor  # [C] local columns with a partner
    teacher: Tensor  # [C] their teacher tokens
    student_rest: Tensor  # [n] local columns without
    teacher_rest: Tensor  # [m] teacher tokens without, of the whole vocabulary
    exist: bool  # on any shard
    width: int  # largest C of any shard
    rest_width: int  # largest n of any shard

    @classmethod
    def of(cls, common: Tensor, shard: VocabShard) -> CommonTokens:
        """``common`` [V_T] is the student's token for each of the teacher's, -1 without one."""
        teacher = torch.nonzero(common >= 0)[:, 0]
        tokens, order = torch.sort(common[teacher])
        if bool((tokens.diff() == 0).any()):
            raise ValueError("common: two teacher tokens share a student token; keep one of them")
        local = tokens - shard.start
        here = (local >= 0) & (local < shard.size)
        free = torch.ones(shard.size, dtype=torch.bool, device=common.device)
        free[local[here]] = False
        # shards are equally wide but for padding, so each knows what the others have
        columns = max(shard.size + shard.padding, 1)
        begins = range(0, shard.vocab_size, columns) if shard.group is not None else range(1)
        taken = torch.bincount(tokens // columns, minlength=len(begins)).tolist()
        sizes = [min(columns, shard.vocab_size - begin) for begin in begins]
        return cls(
            student=local[here],
            teacher=teacher[order][here],
            student_rest=torch.nonzero(free)[:, 0],
            teacher_rest=torch.nonzero(common < 0)[:, 0],
            exist=len(teacher) > 0,
            width=max(taken),
            rest_width=max(size - count for size, count in zip(sizes, taken, strict=True)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Both sides of the common tokens of a shard [r, C]; all may be overwritten."""

    teacher: Tensor
    student: Tensor
    log_teacher: Tensor
    log_student: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """A divergence of each row and its flow, q * dD/dq, from which the gradient is flow - q sum."""

    value: Tensor  # [r]
    flow: Tensor  # [r, C]
    rest: Tensor  # [r]: dD/dq of every token without a partner
    mean: Tensor  # [r]: sum of the flow over all shards and tokens


def matched_divergence(
    pairs: Pairs,
    common: CommonTokens,
    divergence: Divergence,
    *,
    rests: tuple[Tensor, Tensor] | None,
    shard: VocabShard,
) -> Matched:
    """``rests`` are the masses without a partner: the teacher's [r] whole, the student's [r] of
    this shard. None leaves them out: probabilities are held at or above `FLOOR`, and nothing is
    renormalised (TRL); the value may then be negative."""
    live = None
    if rests is None:
        live = pairs.student >= FLOOR
        for probs in (pairs.teacher, pairs.student):
            probs.clamp_min_(FLOOR)
        for logs in (pairs.log_teacher, pairs.log_student):
            logs.clamp_min_(math.log(FLOOR))
    kind = _plain_kind(divergence, bins_only=rests is None)
    if kind is None:
        return _gathered(pairs, common, divergence, rests=rests, live=live, shard=shard)
    value, flow = _closed_form(pairs, kind, divergence.beta)
    if live is not None:
        flow.mul_(live)
    none = torch.zeros_like(value)
    sums = shard.sum(torch.stack([value, flow.sum(dim=-1), none if rests is None else rests[1]]))
    value, mean, student_rest = sums.unbind()
    if rests is None:
        return Matched(value=value, flow=flow, rest=none, mean=mean)
    more, slope = divergence.bins(rests[0][:, None], student_rest[:, None])
    rest = slope[:, 0]
    return Matched(value=value + more[:, 0], flow=flow, rest=rest, mean=mean + student_rest * rest)


def _plain_kind(divergence: Divergence, *, bins_only: bool) -> str | None:
    """The kind, where `_closed_form` has it; its bins add up shard by shard."""
    if divergence.top_k_mode != "tail" and not bins_only:
        return None
    if divergence.kind == "jsd" and divergence.beta in (0.0, 1.0):
        return "forward_kl" if divergence.beta == 0.0 else "reverse_kl"
    return divergence.kind if divergence.kind in ("forward_kl", "reverse_kl", "jsd") else None


def _closed_form(pairs: Pairs, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """[r] sums over this shard's pairs and the flow [r, C], with one logarithm at most."""
    teacher, student = pairs.teacher, pairs.student
    if kind == "forward_kl":
        gap = pairs.log_teacher.sub_(pairs.log_student)
        return torch.linalg.vecdot(teacher, gap), teacher.neg_()
    if kind == "reverse_kl":
        gap = pairs.log_student.sub_(pairs.log_teacher)
        value = torch.linalg.vecdot(student, gap)
        return value, student.mul_(gap.add_(1.0))
    mixture = torch.lerp(student, teacher, beta).clamp_min_(TINY).log_()
    theirs = torch.linalg.vecdot(teacher, pairs.log_teacher.sub_(mixture))
    flow = student.mul_(pairs.log_student.sub_(mixture))
    return beta * theirs + (1.0 - beta) * flow.sum(dim=-1), flow.mul_(1.0 - beta)


def _gathered(
    pairs: Pairs,
    common: CommonTokens,
    divergence: Divergence,
    *,
    rests: tuple[Tensor, Tensor] | None,
    live: Tensor | None,
    shard: VocabShard,
) -> Matched:
    """Any divergence: every shard sees all pairs, 8 bytes per row and pair."""
    spare = (0, common.width - pairs.student.shape[1]) if shard.group is not None else (0, 0)
    # bins with 0 on both sides count nothing
    teacher, student = (
        shard.gather_columns(torch.nn.functional.pad(side, spare))
        for side in (pairs.teacher, pairs.student)
    )
    none = torch.zeros_like(teacher[:, 0])
    if rests is None:
        value, slope = divergence.bins(teacher, student)
        value, rest, student_rest = value.sum(dim=-1), none, none
    else:
        student_rest = shard.sum(rests[1].clone())
        value, slope, at_rest = divergence.support(
            teacher, student, teacher_rest=rests[0][:, None], student_rest=student_rest[:, None]
        )
        rest = at_rest[:, 0]
    first = shard.rank_offset(common.width)
    flow = (student * slope)[:, first : first + pairs.student.shape[1]]
    flow = flow if live is None else flow * live
    mean = shard.sum(flow.sum(dim=-1)) + student_rest * rest
    return Matched(value=value, flow=flow, rest=rest, mean=mean)


def listed_without_rest(
    probs: Tensor, ids: Tensor, teacher: Tensor, divergence: Divergence, *, shard: VocabShard
) -> Slopes:
    """On the listed common tokens alone, without a rest bin (see `matched_divergence`).

    ``probs`` [r, V_local]; ``ids`` [r, K] student tokens, -1 absent; ``teacher`` [r, K].
    """
    present = ids >= 0
    column, mine = shard.local(ids)
    mine = mine & present
    student = shard.sum(torch.where(mine, probs.gather(1, column), 0.0))
    value, slope = divergence.bins(
        torch.where(present, teacher.clamp_min(FLOOR), 0.0),
        torch.where(present, student.clamp_min(FLOOR), 0.0),
    )
    slope = torch.where(present & (student >= FLOOR), slope, 0.0)
    return Slopes(
        value=value.sum(dim=-1),
        rest=torch.zeros_like(value[:, 0]),
        mean=(student * slope).sum(dim=-1),
        parts=((column, torch.where(mine, slope, 0.0)),),
    )
