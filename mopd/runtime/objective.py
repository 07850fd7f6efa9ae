"""A recipe's objective: which loss each teacher has, and with which weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from mopd.config.schema import DivergenceSection, RunConfig
from mopd.losses.balance import Balance
from mopd.losses.base import Loss
from mopd.losses.ctkd import CtkdLoss
from mopd.losses.divergence import Divergence
from mopd.losses.gold import GoldLoss, adaptive_weights
from mopd.losses.head import TeacherTerm
from mopd.losses.kl import KlLoss
from mopd.losses.observe import Carry, Observer
from mopd.losses.opd import BOUNDS, OpdLoss
from mopd.projection import ProjectionShard
from mopd.projection.common import relaxed_common
from mopd.projection.learned import LearnedShard
from mopd.runtime.collate import Objective
from mopd.runtime.payloads import Pair, active_teachers
from mopd.runtime.weights import Normalizer
from mopd.types import Projection

Shard = ProjectionShard | LearnedShard


def static_weights(config: RunConfig) -> dict[str, float]:
    """The recipe's weights of the teachers that are loaded, normalised to 1."""
    teachers = active_teachers(config)
    total = sum(teacher.weight for teacher in teachers.values())
    return {name: teacher.weight / total for name, teacher in teachers.items()}


def step_objective(config: RunConfig, domains: Iterable[str]) -> Objective:
    """How a step weighs its rows; ``domains`` are all that the data has."""
    section = config.distillation
    weights = static_weights(config)
    weighting, selection = section.teacher_weighting, section.teacher_selection
    return Objective(
        weights=weights,
        normalizer=Normalizer(
            teachers=tuple(weights),
            domains=tuple(sorted(set(domains))),
            normalization=section.normalization,
            by_domain=section.domain_normalization == "tokens",
        ),
        score=None if weighting == "static" else weighting,
        selection=None if selection == "none" else selection,
        selection_score=section.selection_score,
        sharpness=section.sharpness,
    )


def loss_balance(config: RunConfig) -> Balance:
    """How much the teachers' losses and the cross entropy count."""
    section = config.distillation
    return Balance(
        mode=section.balance,
        lambda_kd=section.distillation_weight,
        lambda_ce=section.crossentropy_weight,
        decay=section.balance_decay,
    )


def teacher_terms(
    config: RunConfig,
    pairs: Mapping[str, Pair],
    *,
    start: int,
    end: int,
    device: torch.device,
) -> dict[str, TeacherTerm]:
    """One term per teacher, in one order on all ranks; ``start:end`` are this rank's tokens."""
    weights = static_weights(config)
    terms = {}
    for name, pair in pairs.items():
        shard = None
        if pair.projection is not None:
            shard = _shard(config, pair, pair.projection, start=start, end=end, device=device)
        terms[name] = TeacherTerm(
            loss=_LOSSES[pair.loss](config, shard),
            weight=weights[name],
            projection=shard,
            observer=Observer(
                carry=_carry(config, pair.loss),
                temperature=config.distillation.temperature,
                projection=shard,
            ),
        )
    return terms


def _carry(config: RunConfig, loss: str) -> Carry:
    """How the student is read in the teacher's tokens; a merged row has no row to compare with."""
    merge = config.gold.merge if loss == "gold" else config.ctkd.merge
    match loss:
        case "kl":
            return "own"
        case "ctkd" if merge == "boundary":
            return "columns"
        case "gold" | "hkl" if merge == "boundary":
            return "common"
    return "none"


def _shard(
    config: RunConfig,
    pair: Pair,
    projection: Projection,
    *,
    start: int,
    end: int,
    device: torch.device,
) -> Shard:
    if pair.loss == "ctkd" and config.ctkd.learned.enabled:
        return LearnedShard(projection, start=start, end=end, device=device, dtype=torch.float32)
    shard = ProjectionShard(projection, start=start, end=end, device=device)
    threshold = config.ctkd.hkl.threshold
    if pair.loss == "hkl" and threshold is not None:
        return shard.with_common(relaxed_common(projection, threshold))
    if pair.loss == "uld":
        return shard.without_common()
    return shard


def _divergence(section: DivergenceSection) -> Divergence:
    return Divergence(**section.model_dump())


def _value_scale(config: RunConfig) -> float:
    section = config.distillation
    return section.temperature**2 if section.scale_by_t2 else 1.0


def _kl(config: RunConfig, shard: Shard | None) -> Loss:
    return KlLoss(
        divergence=_divergence(config.kl.divergence),
        temperature=config.distillation.temperature,
        value_scale=_value_scale(config),
        support=config.kl.support,
        support_top_k=config.kl.support_top_k,
    )


def _ctkd(config: RunConfig, shard: Shard | None) -> Loss:
    section = config.ctkd
    return CtkdLoss(
        projection=_given(shard),
        divergence=_divergence(section.divergence),
        temperature=config.distillation.temperature,
        value_scale=_value_scale(config),
        lambda_chunk=section.lambda_chunk,
        merge="boundary" if section.merge == "decayed" else section.merge,
    )


def _hkl(config: RunConfig, shard: Shard | None) -> Loss:
    section, own = config.ctkd, config.ctkd.hkl
    return GoldLoss(
        projection=_given(shard),
        divergence=_divergence(section.divergence),
        temperature=config.distillation.temperature,
        value_scale=_value_scale(config),
        weights=(1.0, own.lambda_uld),
        top_u=own.top_u,
        rest_bin=own.rest_bin,
        lambda_chunk=section.lambda_chunk,
        merge="boundary" if section.merge == "decayed" else section.merge,
    )


def _gold(config: RunConfig, shard: Shard | None) -> Loss:
    gold = config.gold
    given = (gold.matched_weight, gold.unmatched_weight)
    return GoldLoss(
        projection=_given(shard),
        divergence=_divergence(gold.divergence),
        temperature=config.distillation.temperature,
        value_scale=_value_scale(config),
        weights=adaptive_weights(_given(shard).common)
        if given[0] is None or given[1] is None
        else (given[0], given[1]),
        top_u=gold.top_u,
        rest_bin=gold.rest_bin,
        lambda_chunk=gold.lambda_chunk,
        merge=gold.merge,
    )


def _uld(config: RunConfig, shard: Shard | None) -> Loss:
    return GoldLoss(
        projection=_given(shard),
        divergence=_divergence(config.gold.divergence),
        temperature=config.distillation.temperature,
        value_scale=_value_scale(config),
        weights=(0.0, 1.0),
        top_u=config.uld.top_u,
        lambda_chunk=0.0,
    )


def _opd(config: RunConfig, shard: Shard | None) -> Loss:
    opd = config.opd
    bounds = BOUNDS[opd.importance]
    if opd.lower is not None and opd.upper is not None:
        bounds = (opd.lower, opd.upper)
    return OpdLoss(
        importance=opd.importance,
        bounds=bounds,
        max_advantage=opd.max_advantage,
        policy=opd.policy,
        discount=opd.discount,
        iw_gamma=opd.iw_gamma,
        sampling_temperature=config.rollout.temperature,
    )


def _given(shard: Shard | None) -> Shard:
    assert shard is not None, "a loss across tokenizers without its projection"
    return shard


_LOSSES: Mapping[str, Callable[[RunConfig, Shard | None], Loss]] = {
    "kl": _kl,
    "ctkd": _ctkd,
    "hkl": _hkl,
    "gold": _gold,
    "uld": _uld,
    "opd": _opd,
}
