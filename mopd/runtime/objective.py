"""A recipe's objective: which loss each teacher has, with which payload and which weight."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from mopd.align.paths import PathOptions
from mopd.align.payload import PayloadOptions
from mopd.config.schema import DivergenceSection, RunConfig, TeacherSection
from mopd.losses.base import Loss
from mopd.losses.ctkd import CtkdLoss
from mopd.losses.divergence import Divergence
from mopd.losses.gold import GoldLoss, adaptive_weights
from mopd.losses.head import TeacherTerm
from mopd.losses.kl import KlLoss
from mopd.projection import ProjectionShard
from mopd.types import Projection


def active_teachers(config: RunConfig) -> dict[str, TeacherSection]:
    """Teachers of weight 0 are not loaded: they change nothing."""
    return {name: teacher for name, teacher in config.teachers.items() if teacher.weight > 0}


def loss_name(config: RunConfig, teacher: TeacherSection) -> str:
    """The teacher's own loss, else the recipe's."""
    return teacher.loss or config.distillation.loss


def teacher_terms(
    config: RunConfig,
    projections: Mapping[str, Projection],
    *,
    start: int,
    end: int,
    device: torch.device,
) -> dict[str, TeacherTerm]:
    """One term per teacher, weights normalised; ``start:end`` are this rank's vocabulary rows."""
    teachers = active_teachers(config)
    total_weight = sum(teacher.weight for teacher in teachers.values())
    terms = {}
    for name, teacher in teachers.items():
        shard = None
        if name in projections:
            shard = ProjectionShard(projections[name], start=start, end=end, device=device)
        terms[name] = TeacherTerm(
            loss=_loss(config, loss_name(config, teacher), shard),
            weight=teacher.weight / total_weight,
            projection=shard,
        )
    return terms


def payload_options(
    config: RunConfig, teacher: TeacherSection, projection: Projection | None
) -> PayloadOptions:
    """What a teacher's rows carry: the fold and path terms for ctkd, the bare top-k otherwise."""
    temperature = config.distillation.temperature
    if projection is None or loss_name(config, teacher) != "ctkd":
        return PayloadOptions(temperature=temperature)
    path = PathOptions(
        trie=projection.trie,
        paths=projection.trie.paths(),
        fold=projection.fold,
        max_length=config.ctkd.max_length,
    )
    return PayloadOptions(
        temperature=temperature,
        fold=_fold(config, projection),
        path=path if config.ctkd.path_terms else None,
    )


def _fold(config: RunConfig, projection: Projection) -> np.ndarray:
    """``rest`` sends the mass of teacher tokens that the student lacks to the tail instead."""
    if config.ctkd.unreachable == "fold":
        return projection.fold
    return np.where(projection.folded, projection.teacher_size, projection.fold)


def _divergence(section: DivergenceSection) -> Divergence:
    return Divergence(**section.model_dump())


def _loss(config: RunConfig, name: str, shard: ProjectionShard | None) -> Loss:
    temperature = config.distillation.temperature
    scale = temperature**2 if config.distillation.scale_by_t2 else 1.0
    if name == "kl" or shard is None:
        return KlLoss(
            divergence=_divergence(config.kl.divergence),
            temperature=temperature,
            value_scale=scale,
        )
    if name == "ctkd":
        return CtkdLoss(
            projection=shard,
            divergence=_divergence(config.ctkd.divergence),
            temperature=temperature,
            value_scale=scale,
            lambda_chunk=config.ctkd.lambda_chunk,
        )
    if name == "uld":
        return GoldLoss(
            projection=shard.without_common(),
            divergence=_divergence(config.gold.divergence),
            temperature=temperature,
            value_scale=scale,
            weights=(0.0, 1.0),
            top_u=config.uld.top_u,
            lambda_chunk=0.0,
        )
    gold = config.gold
    given = (gold.matched_weight, gold.unmatched_weight)
    return GoldLoss(
        projection=shard,
        divergence=_divergence(gold.divergence),
        temperature=temperature,
        value_scale=scale,
        weights=adaptive_weights(shard.common)
        if given[0] is None or given[1] is None
        else (given[0], given[1]),
        top_u=gold.top_u,
        lambda_chunk=gold.lambda_chunk,
    )
