"""What each teacher, each domain and each row counts in a step; a pure function of the payload."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mopd.align.batch import Sample
from mopd.align.select import Score, row_scores
from mopd.types import TeacherRows, TeacherScores

Normalization = Literal["chunk", "token", "sequence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Sums over the samples of a step, to be added over replicas: [teachers, domains] each.

    ``mass`` is what a teacher's mean is taken over, ``samples`` the answers that it was asked for
    and anybody judged.
    """

    mass: np.ndarray
    samples: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalizer:
    """Turns row weights into means over chunks, tokens or sequences, domain by domain.

    With ``by_domain`` a teacher's loss is the mean over each of its domains, weighted by the
    domain's answers in the step: long answers do not outvote short ones of another domain.
    """

    teachers: tuple[str, ...]
    domains: tuple[str, ...]
    normalization: Normalization
    by_domain: bool

    def sequence_weights(self, samples: Sequence[Sample]) -> list[Sample]:
        """For means over sequences: every row counts 1 / (response tokens of its answer)."""
        if self.normalization != "sequence":
            return list(samples)
        return [
            scaled(sample, {n: 1.0 / max(len(sample.rollout.token_ids), 1) for n in sample.rows})
            for sample in samples
        ]

    def shares(self, samples: Sequence[Sample]) -> Shares:
        """Of this replica, before anything was weighed.

        A teacher whose reply to an answer failed counts there as the others do, so that they can
        stand in for it (`stand_ins`).
        """
        mass = np.zeros((len(self.teachers), len(self.domains)))
        count = np.zeros_like(mass)
        for sample in samples:
            domain = self.domains.index(sample.rollout.prompt.domain)
            own = {name: self._mass(*mass_) for name, mass_ in sample.mass.items()}
            judged = [value for value in own.values() if value > 0]
            for name, value in own.items():
                if judged:
                    teacher = self.teachers.index(name)
                    mass[teacher, domain] += value if value > 0 else sum(judged) / len(judged)
                    count[teacher, domain] += 1.0
        return Shares(mass=mass, samples=count)

    def _mass(self, chunks: float, tokens: float) -> float:
        match self.normalization:
            case "chunk":
                return chunks
            case "token":
                return tokens
            case "sequence":
                return float(chunks > 0)

    def denominators(self, total: Shares) -> dict[str, float]:
        """Per teacher, from the sums over all replicas."""
        return dict(zip(self.teachers, total.mass.sum(axis=1).tolist(), strict=True))

    def domain_weights(self, samples: Sequence[Sample], total: Shares) -> list[Sample]:
        """``samples`` with every row times D / D_domain times the domain's share of answers."""
        if not self.by_domain:
            return list(samples)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = total.samples / total.samples.sum(axis=1, keepdims=True)
            factor = share * total.mass.sum(axis=1, keepdims=True) / total.mass
        result = []
        for sample in samples:
            domain = self.domains.index(sample.rollout.prompt.domain)
            factors = {n: float(factor[self.teachers.index(n), domain]) for n in sample.rows}
            result.append(scaled(sample, {n: f for n, f in factors.items() if math.isfinite(f)}))
        return result


def scaled(sample: Sample, factors: Mapping[str, float]) -> Sample:
    """The rows of each named teacher times its factor."""
    rows = dict(sample.rows)
    for name, factor in factors.items():
        if factor != 1.0:
            rows[name] = _scaled_rows(rows[name], factor)
    return replace(sample, rows=rows)


def _scaled_rows(rows: TeacherRows, factor: float) -> TeacherRows:
    names = ("row_weight", "chunk_weight", "path_weight", "native_weight")
    changed = {name: (getattr(rows, name) * factor).astype(np.float32) for name in names}
    return replace(rows, **changed)


def stand_ins(sample: Sample, weights: Mapping[str, float], *, selected: bool) -> Sample:
    """Teachers that judge an answer count for those asked in vain.

    Where teachers were selected chunk by chunk, their rows share each token already, and every one
    of them counts with the weight of all: the shares add up to 1, the weights must not cut them.
    """
    alive = [name for name, (chunks, _) in sample.mass.items() if chunks > 0]
    asked = sum(weights[name] for name in sample.mass)
    if not alive or asked <= 0:
        return sample
    if selected:
        return scaled(sample, {n: asked / weights[n] for n in alive if weights[n] > 0})
    left = sum(weights[name] for name in alive)
    return scaled(sample, dict.fromkeys(alive, asked / left)) if left > 0 else sample


def score_sums(scores: TeacherScores, kind: Score) -> tuple[float, float]:
    """(sum, count) of a teacher's score of one answer; the higher, the surer the teacher.

    ``nll``: log-probability per byte, which does not depend on the tokenizer; ``entropy``: minus
    the entropy over the listed tokens and the tail; ``confidence``: the largest probability.
    Missing rows and their bytes count nothing.
    """
    valid = scores.valid
    if kind == "nll":
        num_bytes = np.diff(scores.byte_ends, prepend=0)[valid].sum()
        return float(scores.logprobs[valid].astype(np.float64).sum()), float(num_bytes)
    per_row = row_scores(scores, kind)[valid]
    return float(per_row.sum()), float(len(per_row))


def dynamic_weights(
    static: Mapping[str, float], sums: Mapping[str, tuple[float, float]], sharpness: float
) -> dict[str, float]:
    """``static`` times exp(sharpness * mean score), normalised; teachers unheard keep nothing."""
    means = {name: total / count for name, (total, count) in sums.items() if count > 0}
    if not means:
        return dict(static)
    top = max(means.values())
    raw = {
        n: static[n] * math.exp(sharpness * (means[n] - top)) if n in means else 0.0 for n in static
    }
    whole = sum(raw.values())
    return {name: value / whole for name, value in raw.items()} if whole > 0 else dict(static)
