"""What a recipe's objective is made of: tokenizers, projections, and the head of all losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from mopd.config.schema import RunConfig, StudentSection, TeacherSection
from mopd.errors import ArtifactError, ConfigError
from mopd.losses.head import DistillationHead
from mopd.losses.vocab import VocabShard
from mopd.metrics.announced import announced
from mopd.projection import ProjectionStore
from mopd.runtime.objective import teacher_terms
from mopd.runtime.payloads import Pair, active_teachers, loss_name, pairs, projection_options
from mopd.student.parallel import Topology
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Projection


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizers:
    """The student's, and the teachers' by name."""

    student: ChatTokenizer
    teachers: Mapping[str, ChatTokenizer]


def load_tokenizers(config: RunConfig) -> Tokenizers:
    """Of the student and of all teachers that count.

    Raises:
        ConfigError: a tokenizer is missing, damaged, or not the one that a loss needs.
    """
    student = _tokenizer("student", config.student)
    found = Tokenizers(
        student=student,
        teachers={
            name: student
            if teacher.backend.type == "self"
            else _tokenizer(f"teachers.{name}", teacher)
            for name, teacher in active_teachers(config).items()
        },
    )
    _check_tokenizers(config, found)
    return found


def _tokenizer(key: str, section: StudentSection | TeacherSection) -> ChatTokenizer:
    path = str(section.tokenizer or section.model)
    try:
        found = ChatTokenizer.load(path, eos_token=section.eos_token)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    found.check_end(key)
    return found


def _check_tokenizers(config: RunConfig, tokenizers: Tokenizers) -> None:
    own = tokenizers.student.vocabulary.fingerprint
    for name, teacher in active_teachers(config).items():
        same = tokenizers.teachers[name].vocabulary.fingerprint == own
        if loss_name(config, teacher) == "kl" and not same:
            raise ConfigError(
                f"teachers.{name}.loss=kl needs the student's own tokenizer, and this teacher has "
                "another one; use ctkd or gold"
            )


def load_pairs(config: RunConfig, tokenizers: Tokenizers, topology: Topology) -> dict[str, Pair]:
    """One rank builds what is missing, the others read it; all stay on the CPU."""
    store = ProjectionStore(Path(config.cache_dir) / "projections")
    options = projection_options(config)
    student = tokenizers.student.vocabulary
    teachers = {name: chat.vocabulary for name, chat in tokenizers.teachers.items()}
    sections = active_teachers(config)
    needed = [n for n, t in sections.items() if loss_name(config, t) not in ("kl", "opd")]

    def get(name: str) -> Projection:
        path = sections[name].projection_matrix_path
        try:
            with announced(f"the projection onto the tokens of teachers.{name}"):
                return store.get(student, teachers[name], options, path=path)
        except ArtifactError as error:
            if path is None:
                raise
            raise ConfigError(f"teachers.{name}.projection_matrix_path: {error}") from error

    def read() -> dict[str, Projection]:
        return {name: get(name) for name in needed}

    found = read() if topology.rank == 0 else {}
    dist.barrier()
    return pairs(config, found or read(), student=student, teachers=teachers)


def build_head(
    config: RunConfig,
    tokenizers: Tokenizers,
    found: Mapping[str, Pair],
    *,
    topology: Topology,
    padded_vocab_size: int,
) -> DistillationHead:
    """The losses of all teachers against this rank's columns of ``padded_vocab_size``.

    Raises:
        ConfigError: a rank would have columns of padding only.
    """
    size = padded_vocab_size // topology.tp_size
    start, vocab_size = topology.tp_rank * size, tokenizers.student.vocabulary.size
    if start + size > vocab_size and (topology.tp_size - 1) * size >= vocab_size:
        raise ConfigError(
            f"student.parallel.tensor_model_parallel_size={topology.tp_size}: a vocabulary of "
            f"{vocab_size} tokens leaves the last rank without one; lower it"
        )
    return DistillationHead(
        terms=teacher_terms(config, found, start=start, end=start + size, device=topology.device),
        shard=VocabShard(start=start, size=size, vocab_size=vocab_size, group=topology.tp_group),
    )
