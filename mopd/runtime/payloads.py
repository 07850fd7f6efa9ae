"""What each teacher's rows carry, by its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mopd.align.interior import Interior
from mopd.align.paths import PathOptions
from mopd.align.payload import PayloadOptions
from mopd.align.pull import Pieces
from mopd.config.schema import CtkdSection, RunConfig, TeacherSection
from mopd.projection import ProjectionOptions
from mopd.projection.audit import recommend
from mopd.projection.build import teacher_pieces
from mopd.projection.options import Similarity
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import Projection

LossKind = str  # ctkd (its pkl), hkl, gold, uld, kl or opd


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A teacher's loss and the tables between the two vocabularies, where the loss needs any."""

    loss: LossKind
    projection: Projection | None


def active_teachers(config: RunConfig) -> dict[str, TeacherSection]:
    """Teachers of weight 0 are not loaded: they change nothing."""
    return {name: teacher for name, teacher in config.teachers.items() if teacher.weight > 0}


def loss_name(config: RunConfig, teacher: TeacherSection) -> str:
    """The teacher's own loss, else the recipe's."""
    return teacher.loss or config.distillation.loss


def projection_options(config: RunConfig) -> ProjectionOptions:
    """How the recipe wants projections built."""
    section = config.ctkd
    return ProjectionOptions(
        max_length=section.max_length,
        gamma=section.gamma,
        map=section.map,
        roles=section.roles,
        similarity=Similarity.of(Path(section.similarity)) if section.similarity else None,
    )


def pairs(
    config: RunConfig,
    projections: Mapping[str, Projection],
    *,
    student: Vocabulary,
    teachers: Mapping[str, Vocabulary],
) -> dict[str, Pair]:
    """Every teacher's loss, ``loss_type: auto`` decided by the audit of the two vocabularies."""
    found = {}
    for name, teacher in active_teachers(config).items():
        kind, projection = loss_name(config, teacher), projections.get(name)
        if kind == "ctkd" and projection is not None:
            loss_type = config.ctkd.loss_type
            if loss_type == "auto":
                loss_type = recommend(projection, student, teachers[name])
            kind = "hkl" if loss_type == "hkl" else "ctkd"
        found[name] = Pair(loss=kind, projection=projection)
    return found


def payload_options(
    config: RunConfig, pair: Pair, *, student: Vocabulary, teacher: Vocabulary
) -> PayloadOptions:
    """Fold, path terms, native rows and merges for ctkd; the bare lists, or merged ones, else."""
    temperature = config.distillation.temperature
    section = config.ctkd
    if pair.loss == "gold":
        return PayloadOptions(temperature=temperature, merge=config.gold.merge)
    if pair.loss == "hkl":
        return PayloadOptions(temperature=temperature, merge=section.merge)
    if pair.loss != "ctkd" or pair.projection is None:
        return PayloadOptions(temperature=temperature)
    projection = pair.projection
    if section.direction == "pull" or section.merge == "decayed":
        return PayloadOptions(
            temperature=temperature,
            direction=section.direction,
            merge=section.merge,
            pieces=_pieces(config, student, teacher),
        )
    path = PathOptions(
        trie=projection.trie,
        fold=projection.fold,
        max_length=section.max_length,
        canonical=section.canonical_paths,
    )
    return PayloadOptions(
        temperature=temperature,
        fold=_fold(section, projection),
        path=path if section.path_terms else None,
        merge=section.merge,
        interior=_interior(student, teacher) if section.interior_rows else None,
        renormalize=section.unreachable == "renorm",
    )


def _fold(section: CtkdSection, projection: Projection) -> np.ndarray:
    """All but ``fold`` take the mass of teacher tokens that the student lacks away."""
    if section.unreachable == "fold":
        return projection.fold
    return np.where(projection.folded, projection.teacher_size, projection.fold)


def _pieces(config: RunConfig, student: Vocabulary, teacher: Vocabulary) -> Pieces:
    spelled, _ = teacher_pieces(student, teacher, projection_options(config))
    ends = np.cumsum([len(ids) for ids in spelled], dtype=np.int64)
    return Pieces(
        piece_ptr=np.concatenate([np.zeros(1, dtype=np.int64), ends]),
        piece=np.array([piece for ids in spelled for piece in ids], dtype=np.int32),
        decay=config.ctkd.gamma,
        top_k=config.distillation.top_k or student.size,
    )


def _interior(student: Vocabulary, teacher: Vocabulary) -> Interior:
    def first_token(data: bytes) -> int:
        ids = student.encode(data)
        return ids[0] if ids else -1

    return Interior(
        student_bytes=student.token_bytes,
        teacher_bytes=teacher.token_bytes,
        first_token=first_token,
    )
