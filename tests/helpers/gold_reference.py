"""GOLD in float64 from the formulas alone, row by row and pair by pair, and random problems."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopd.losses.divergence import Divergence
from mopd.losses.gold import GoldLoss
from mopd.losses.vocab import VocabShard
from mopd.projection import ProjectionShard
from mopd.types import Projection, TeacherRows
from tests.helpers.ctkd_problems import merged
from tests.helpers.losses import make_projection, make_rows, run_head

FLOOR = 1e-8


@dataclass(frozen=True)
class GoldProblem:
    """``logits`` [n, V_S]; ``teacher`` [r, V_T] logits of the boundary rows ``position``."""

    logits: Tensor
    teacher: np.ndarray
    position: list[int]
    projection: Projection

    def dense(self) -> TeacherRows:
        count = len(self.position)
        rows = make_rows(self.position, np.zeros((count, 1)), np.ones((count, 1)))
        return dataclasses.replace(
            rows,
            row_weight=np.linspace(0.5, 1.5, count),
            topk_ids=None,
            topk_logprobs=self.teacher,
        )

    def listed(self, top: int, temperature: float = 1.0) -> TeacherRows:
        """Each row's ``top`` largest, one slot more that is padding."""
        probs = self._probs(temperature)
        ids = np.argsort(-probs, axis=1)[:, :top]
        padded = np.pad(ids, ((0, 0), (0, 1)), constant_values=-1)
        listed = np.pad(np.take_along_axis(probs, ids, axis=1), ((0, 0), (0, 1)))
        return make_rows(self.position, padded, listed)

    def shared(self, ids: np.ndarray, temperature: float = 1.0) -> TeacherRows:
        """The same columns for all rows."""
        rows = make_rows(self.position, ids[None], self._probs(temperature)[:, ids])
        return dataclasses.replace(rows, topk_ids=ids.astype(np.int32))

    def _probs(self, temperature: float) -> np.ndarray:
        return torch.softmax(torch.as_tensor(self.teacher / temperature), -1).numpy()


def gold_problem(
    sizes: tuple[int, int], common: int, *, seed: int = 0, rows: int = 5
) -> GoldProblem:
    """``common`` random pairs; boundaries on all rows but the second."""
    generator = np.random.default_rng(seed)
    student, teacher = sizes
    partners = np.full(teacher, -1)
    partners[generator.permutation(teacher)[:common]] = generator.permutation(student)[:common]
    return GoldProblem(
        logits=torch.as_tensor(generator.normal(size=(rows, student)) * 2.0),
        teacher=generator.normal(size=(rows - 1, teacher)) * 2.0,
        position=[i for i in range(rows) if i != 1],
        projection=make_projection(np.eye(student, teacher + 1), common=partners),
    )


def gold_loss(projection: ProjectionShard, options: dict[str, Any]) -> GoldLoss:
    """``divergence`` must be given; the rest as `reference` takes it."""
    temperature = options.get("temperature", 1.0)
    return GoldLoss(
        projection=projection,
        divergence=options["divergence"],
        temperature=temperature,
        value_scale=temperature**2,
        weights=options.get("weights", (0.5, 0.5)),
        top_u=options.get("top_u"),
        rest_bin=options.get("rest_bin", True),
        lambda_chunk=options.get("lambda_chunk", 0.0),
        merge=options.get("merge", "boundary"),
    )


def run_gold(
    logits: Tensor,
    rows: TeacherRows,
    projection: Projection,
    options: dict[str, Any],
    *,
    block_size: int = 512,
) -> tuple[Tensor, Tensor]:
    """(value, gradient) of one process; columns behind the student's vocabulary are padding."""
    size = logits.shape[1]
    local = ProjectionShard(projection, start=0, end=size, device=logits.device)
    return run_head(
        gold_loss(local, options),
        logits,
        rows,
        shard=VocabShard(start=0, size=size, vocab_size=projection.student_size),
        projection=local,
        block_size=block_size,
    )


def reference(
    logits: Tensor, rows: TeacherRows, projection: Projection, options: dict[str, Any]
) -> Tensor:
    """The loss under autograd, times the temperature squared."""
    temperature = options.get("temperature", 1.0)
    weights = options.get("weights", (0.5, 0.5))
    total = logits.new_zeros(())
    probs = torch.softmax(logits[:, : projection.student_size] / temperature, -1)
    for r, at in enumerate(rows.position):
        merge = options.get("merge", "boundary")
        q = probs[at] if merge == "boundary" else merged(probs, rows, r, merge)
        matched, rest, entries = _teacher(rows, r, projection, temperature)
        value = _matched(q, matched, rest, options)
        taken = set(projection.common.tolist())
        free = [s for s in range(len(q)) if s not in taken]
        cut = options.get("top_u")
        ours = torch.sort(q[free], descending=True).values[:cut]
        theirs = torch.sort(entries, descending=True).values
        theirs = theirs[:cut] if rows.topk_ids is None else theirs
        width = max(len(ours), len(theirs))
        pad = torch.nn.functional.pad
        gap = pad(ours, (0, width - len(ours))) - pad(theirs, (0, width - len(theirs)))
        row = weights[0] * value + weights[1] * gap.abs().sum()
        total = total + float(rows.row_weight[r]) * row
    return total * temperature**2


def _teacher(
    rows: TeacherRows, r: int, projection: Projection, temperature: float
) -> tuple[dict[int, float], float, Tensor]:
    """Matched student token -> probability, the mass without a partner, and its entries."""
    logs = torch.as_tensor(rows.topk_logprobs[r])
    if rows.topk_ids is None:
        probs, ids, tail = torch.softmax(logs / temperature, -1), range(len(logs)), []
    else:
        ids = (rows.topk_ids if rows.topk_ids.ndim == 1 else rows.topk_ids[r]).tolist()
        probs, tail = torch.exp(logs), [float(np.exp(rows.log_tail[r]))]
    matched, entries = {}, tail
    for token, p in zip(ids, probs.tolist(), strict=True):
        if token >= 0 and projection.common[token] >= 0:
            matched[int(projection.common[token])] = p
        elif token >= 0:
            entries.append(p)
    return matched, sum(entries), torch.tensor(entries, dtype=torch.float64)


def _matched(q: Tensor, matched: dict[int, float], rest: float, options: dict[str, Any]) -> Tensor:
    tokens = sorted(matched)
    divergence = options["divergence"]
    p, inside = torch.tensor([matched[s] for s in tokens], dtype=q.dtype), q[tokens]
    if not options.get("rest_bin", True):
        return _textbook(p.clamp_min(FLOOR), inside.clamp_min(FLOOR), divergence)
    outside = torch.stack([x for s, x in enumerate(q) if s not in matched] or [q.new_zeros(())])
    rests = torch.tensor([rest], dtype=q.dtype), outside.sum()[None]
    if divergence.top_k_mode == "renorm":
        return _textbook(p / p.sum(), inside / inside.sum(), divergence)
    if divergence.top_k_mode == "genkl":
        return _textbook(p, inside, divergence) + (inside - p).sum()
    if divergence.top_k_mode == "trunc":
        return _textbook(p, inside, divergence)
    return _textbook(torch.cat([p, rests[0]]), torch.cat([inside, rests[1]]), divergence)


def _textbook(p: Tensor, q: Tensor, divergence: Divergence) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        safe_a, safe_b = torch.where(a > 0, a, 1.0), torch.where(a > 0, b, 1.0)
        return torch.where(a > 0, a * (safe_a.log() - safe_b.clamp_min(1e-30).log()), 0.0).sum()

    forward, reverse = kl(p, q), kl(q, p)
    match divergence.kind:
        case "forward_kl":
            return forward
        case "reverse_kl":
            return reverse
        case "jsd":
            if divergence.beta in (0.0, 1.0):
                return reverse if divergence.beta else forward
            mixture = divergence.beta * p + (1 - divergence.beta) * q
            return divergence.beta * kl(p, mixture) + (1 - divergence.beta) * kl(q, mixture)
        case "mixed":
            return divergence.weight * forward + (1 - divergence.weight) * reverse
        case "skew_kl":
            return kl(p, divergence.skew * p + (1 - divergence.skew) * q)
        case "skew_reverse_kl":
            return kl(q, divergence.skew * q + (1 - divergence.skew) * p)
        case "tvd":
            return 0.5 * (p - q).abs().sum()
        case "akl":
            order = torch.argsort(p)
            tail = torch.zeros_like(p).index_put((order,), p[order].cumsum(0)) <= divergence.alpha
            gap = (p - q).detach().abs()
            share = (gap * ~tail).sum() / gap.sum()
            return share * forward + (1 - share) * reverse
