"""Projections that are trained along with the student (`ctkd.learned`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from mopd.config.schema import RunConfig
from mopd.losses.head import TeacherTerm
from mopd.projection.learned import LearnedShard, joined, load_learned, save_learned
from mopd.runtime.payloads import Pair
from mopd.student.step import Companions, Student


def learned_companions(
    config: RunConfig, terms: Mapping[str, TeacherTerm], pairs: Mapping[str, Pair]
) -> Companions | None:
    """The learned projections among the terms, with the weights of an earlier run if one is named.

    Raises:
        ArtifactError: the earlier run's file belongs to another projection.
    """
    section = config.ctkd.learned
    members = {
        name: term.projection
        for name, term in terms.items()
        if isinstance(term.projection, LearnedShard)
    }
    if not members:
        return None
    if section.path is not None:
        for name, shard in members.items():
            projection = pairs[name].projection
            assert projection is not None
            shard.load(load_learned(_file(Path(section.path), name), projection))
    return Companions(members=members, lr=section.lr)


def save_learned_projections(
    student: Student, pairs: Mapping[str, Pair], directory: Path
) -> list[Path]:
    """Whole matrices, one file per teacher; collective over the last stage's ranks."""
    topology = student.model.topology
    if student.companions is None or not topology.is_last_stage:
        return []
    if topology.dp_rank or topology.cp_rank:  # they have the same
        return []
    written = []
    for name, companion in student.companions.members.items():
        states = [companion.state()]
        if topology.tp_group is not None:
            states = states * topology.tp_size
            dist.all_gather_object(states, companion.state(), group=topology.tp_group)
        projection = pairs[name].projection
        assert projection is not None
        if topology.tp_rank == 0:
            save_learned(_file(directory, name), projection, joined(states))
            written.append(_file(directory, name))
    return written


def _file(directory: Path, teacher: str) -> Path:
    return directory / f"{teacher}.safetensors"
