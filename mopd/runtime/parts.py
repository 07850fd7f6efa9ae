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
    student = load_tokenizer("student", config.student)
    found = Tokenizers(
        student=student,
        teachers={
            name: student
            if teacher.backend.type == "self"
            else load_tokenizer(f"teachers.{name}", teacher)
            for name, teacher in active_teachers(config).items()
        },
    )
    check_tokenizers(config, found)
    return found


def load_tokenizer(key: str, section: StudentSection | TeacherSection) -> ChatTokenizer:
    """Of ``student`` or of ``teachers.<name>``, by the section of that key.

    Raises:
        ConfigError: it is missing or damaged, or does not end a turn as its template does.
    """
    path = str(section.tokenizer or section.model)
    try:
        found = ChatTokenizer.load(path, eos_token=section.eos_token)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    found.check_end(key)
    return found


def check_tokenizers(config: RunConfig, tokenizers: Tokenizers) -> None:
    """Raises ConfigError where a loss needs the student's tokenizer and a teacher has another."""
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
    student = tokenizers.student.vocabulary
    teachers = {name: chat.vocabulary for name, chat in tokenizers.teachers.items()}

    def read() -> dict[str, Projection]:
        found: dict[str, Projection] = {}
        for name in projected(config):
            with announced(f"the projection onto the tokens of teachers.{name}"):
                found[name] = load_projection(config, tokenizers, name)
        return found

    found = read() if topology.rank == 0 else {}
    dist.barrier()
    return pairs(config, found or read(), student=student, teachers=teachers)


def projected(config: RunConfig) -> list[str]:
    """Teachers whose loss needs a projection."""
    sections = active_teachers(config)
    return [n for n, t in sections.items() if loss_name(config, t) not in ("kl", "opd")]


def load_projection(config: RunConfig, tokenizers: Tokenizers, name: str) -> Projection:
    """That of a teacher: its own file, or the one in the cache, which is built where it is missing.

    Raises:
        ConfigError: the teacher's own file is of other tokenizers, or damaged.
    """
    store = ProjectionStore(Path(config.cache_dir) / "projections")
    path = config.teachers[name].projection_matrix_path
    pair = (tokenizers.student.vocabulary, tokenizers.teachers[name].vocabulary)
    try:
        return store.get(*pair, projection_options(config), path=path)
    except ArtifactError as error:
        if path is None:
            raise
        raise ConfigError(f"teachers.{name}.projection_matrix_path: {error}") from error


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
