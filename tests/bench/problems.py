"""Inputs of the rows: logits, teacher payloads, projections. Fixed seeds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mopd.align.boundaries import align_bytes
from mopd.align.paths import PathOptions
from mopd.align.payload import PayloadOptions, teacher_rows
from mopd.projection import ProjectionOptions, ProjectionShard, ProjectionStore
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import Alignment, Projection, TeacherRows, TeacherScores, no_native_rows
from tests.bench import vocabularies
from tests.bench.formulas import Lists, Paths

OPTIONS = ProjectionOptions(max_length=4, gamma=0.0)
TOP_K = 64


def peaked_logits(rows: int, size: int, *, seed: int) -> Tensor:
    """[rows, size] float32: one token per row holds most of the mass, as it does on-policy."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, size, generator=generator).mul_(2.0)
    likely = torch.randint(size, (rows,), generator=generator)
    logits[torch.arange(rows), likely] += 10.0 + 4.0 * torch.rand(rows, generator=generator)
    return logits


def near(logits: Tensor, *, seed: int) -> Tensor:
    """Logits of a teacher that mostly agrees."""
    generator = torch.Generator().manual_seed(seed)
    return logits + torch.randn(logits.shape, generator=generator)


def rows_of(ids: np.ndarray | None, logprobs: np.ndarray, log_tail: np.ndarray) -> TeacherRows:
    """A boundary on every row, without chunks and paths."""
    count = len(logprobs)
    none = np.zeros(0, dtype=np.int64)
    return TeacherRows(
        teacher="t",
        position=np.arange(count),
        row_weight=np.ones(count, dtype=np.float32),
        topk_ids=ids,
        topk_logprobs=logprobs,
        log_tail=log_tail,
        chunk_logprob=np.zeros(count, dtype=np.float32),
        chunk_size=np.ones((count, 2), dtype=np.int32),
        chunk_weight=np.ones(count, dtype=np.float32),
        chunk_owned=np.ones(count, dtype=bool),
        chunk_sequence=np.zeros(count, dtype=np.int64),
        token_position=none,
        token_id=none,
        token_chunk=none,
        token_sampling_logprob=np.zeros(0, dtype=np.float32),
        **no_native_rows(),
        path_position=none,
        path_weight=np.zeros(0, dtype=np.float32),
        path_offsets=np.zeros(1, dtype=np.int64),
        path_target=np.zeros(0, dtype=np.float32),
        path_entry_slot=none,
        path_entry=none,
    )


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids [n, k], log-probabilities [n, k] and the log of the rest [n] of a teacher's logits."""
    log_probs = torch.log_softmax(logits, -1)
    values, ids = log_probs.topk(k, dim=-1)
    rest = torch.exp(log_probs).scatter_(1, ids, 0.0).sum(-1)
    return ids, values, torch.log(rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two tokenizers and what joins them."""

    student: Vocabulary
    teacher: Vocabulary
    words: dict[str, list[str]]
    projection: Projection


@lru_cache(maxsize=3)
def vocabularies_of(
    sizes: tuple[int, int],
) -> tuple[Vocabulary, Vocabulary, dict[str, list[str]]]:
    """(student, teacher, lexicon); the teacher splits numbers into digits."""
    words = vocabularies.lexicon(sum(sizes))
    student = vocabularies.tokenizer(words, sizes[0], seed=1, digits=False)
    return student, vocabularies.tokenizer(words, sizes[1], seed=2, digits=True), words


def pair(sizes: tuple[int, int], cache: Path) -> Pair:
    """The tokenizers of ``sizes``; their projection is kept under ``cache``."""
    student, teacher, words = vocabularies_of(sizes)
    projection = ProjectionStore(cache).get(student, teacher, OPTIONS)
    return Pair(student=student, teacher=teacher, words=words, projection=projection)


def payload_options(projection: Projection) -> PayloadOptions:
    """The recipes' defaults: temperature 1, fold, path terms."""
    path = PathOptions(
        trie=projection.trie,
        fold=projection.fold,
        max_length=OPTIONS.max_length,
    )
    return PayloadOptions(temperature=1.0, fold=projection.fold, path=path)


def scores_of(ids: np.ndarray, teacher: Vocabulary, *, seed: int) -> TeacherScores:
    """A teacher's rows for its own ``ids``: the actual token and 63 others, falling slowly."""
    generator = np.random.default_rng(seed)
    stride = generator.integers(1, max(2, teacher.size // TOP_K), size=(len(ids), 1))
    listed = (ids[:, None] + stride * np.arange(TOP_K)) % teacher.size
    steepness = generator.uniform(0.8, 3.0, size=(len(ids), 1))
    mass = np.arange(1, TOP_K + 1) ** -steepness
    tail = generator.uniform(0.001, 0.05, size=len(ids))
    mass *= ((1.0 - tail) / mass.sum(1))[:, None]
    logs = np.log(mass).astype(np.float32)
    return TeacherScores(
        teacher="t",
        model_fingerprint="synthetic",
        token_ids=ids,
        byte_ends=teacher.byte_ends(ids),
        logprobs=logs[:, 0],
        topk_ids=listed.astype(np.int32),
        topk_logprobs=logs,
        log_tail=np.log(tail).astype(np.float32),
        lse=None,
        valid=np.ones(len(ids), dtype=bool),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """One sample as alignment sees it."""

    student_ids: np.ndarray
    student_ends: np.ndarray
    scores: TeacherScores

    @property
    def tokens(self) -> int:
        return len(self.student_ids) + len(self.scores.token_ids)


def sequence(of: Pair, content: str, *, seed: int) -> Sequence:
    ids = vocabularies.token_ids(of.student, content)
    theirs = vocabularies.token_ids(of.teacher, content)
    return Sequence(
        student_ids=ids,
        student_ends=of.student.byte_ends(ids),
        scores=scores_of(theirs, of.teacher, seed=seed),
    )


def aligned(sample: Sequence, options: PayloadOptions) -> tuple[Alignment, TeacherRows]:
    """What the data path does with one sample and one teacher."""
    alignment = align_bytes(sample.student_ends, sample.scores.byte_ends, both_end_turn=False)
    rows = teacher_rows(
        sample.scores,
        alignment,
        student_ids=sample.student_ids,
        trainable=np.ones(len(sample.student_ids), dtype=bool),
        options=options,
    )
    return alignment, rows


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossProblem:
    """A student's logits and a teacher's payload across tokenizers."""

    logits: Tensor  # [rows, padded V_S]
    rows: TeacherRows
    projection: Projection
    shard: ProjectionShard
    teacher_tokens: int


def cross_problem(sizes: tuple[int, int], rows: int, cache: Path) -> CrossProblem:
    """``rows`` student tokens of mixed text; the teacher's rows go through the real data path."""
    of = pair(sizes, cache)
    parts = [vocabularies.text(of.words, d, rows, seed=3) for d in vocabularies.DOMAINS]
    share = rows // 4
    ids = np.concatenate([vocabularies.token_ids(of.student, part)[:share] for part in parts])
    content = of.student.decode(ids)
    theirs = np.asarray(of.teacher.encode(content), dtype=np.int32)
    sample = Sequence(
        student_ids=ids,
        student_ends=of.student.byte_ends(ids),
        scores=scores_of(theirs, of.teacher, seed=4),
    )
    _, payload = aligned(sample, payload_options(of.projection))
    logits = peaked_logits(len(ids), sizes[0], seed=5)
    logits[torch.arange(len(ids)), torch.from_numpy(ids).long()] += 8.0
    shard = ProjectionShard(of.projection, start=0, end=sizes[0], device=torch.device("cpu"))
    return CrossProblem(
        logits=logits,
        rows=payload,
        projection=of.projection,
        shard=shard,
        teacher_tokens=len(theirs),
    )


def nothing_common(problem: CrossProblem) -> CrossProblem:
    """The same with no token in common: plain ULD."""
    projection = replace(problem.projection, common=np.full_like(problem.projection.common, -1))
    shard = ProjectionShard(
        projection, start=0, end=problem.logits.shape[1], device=torch.device("cpu")
    )
    return replace(problem, projection=projection, shard=shard)


def dense_teacher(problem: CrossProblem, *, seed: int) -> Tensor:
    """[R, V_T] logits of a teacher that mostly agrees where a student token has the same bytes.

    On every fourth row its favourite is a token that the student lacks.
    """
    generator = torch.Generator().manual_seed(seed)
    common = torch.from_numpy(problem.projection.common.astype(np.int64))
    known, free = (torch.nonzero(which)[:, 0] for which in (common >= 0, common < 0))
    count = len(problem.rows.position)
    logits = torch.randn(count, len(common), generator=generator).mul_(2.0)
    student = near(problem.logits[torch.from_numpy(problem.rows.position)], seed=seed)
    logits[:, known] = student[:, common[known]]
    if len(free):
        rows = torch.arange(0, count, 4)
        logits[rows, free[torch.randint(len(free), (len(rows),), generator=generator)]] += 14.0
    return logits


def dense_rows(problem: CrossProblem, teacher: Tensor) -> TeacherRows:
    """The boundaries of ``problem`` with dense logits, without chunks and paths."""
    no_tail = np.full(len(teacher), -np.inf, dtype=np.float32)
    rows = rows_of(None, teacher.numpy(), no_tail)
    return replace(rows, position=problem.rows.position)


def lists_of(rows: TeacherRows, dtype: torch.dtype) -> Lists:
    present = torch.from_numpy(rows.topk_ids >= 0)
    probs = torch.from_numpy(rows.topk_logprobs).to(dtype).exp()
    return Lists(
        position=torch.from_numpy(rows.position),
        ids=torch.from_numpy(rows.topk_ids).long(),
        probs=torch.where(present, probs, 0.0),
        tail=torch.from_numpy(rows.log_tail).to(dtype).exp(),
    )


def paths_of(problem: CrossProblem, dtype: torch.dtype) -> Paths:
    rows = problem.rows
    entry, token = problem.shard.fibre_entries(rows.path_entry)
    slot_path = np.repeat(np.arange(len(rows.path_position)), np.diff(rows.path_offsets))
    return Paths(
        position=torch.from_numpy(rows.path_position),
        weight=torch.from_numpy(rows.path_weight).to(dtype),
        slot_path=torch.from_numpy(slot_path),
        target=torch.from_numpy(rows.path_target).to(dtype),
        entry_slot=torch.from_numpy(rows.path_entry_slot[entry]),
        entry_token=torch.from_numpy(token.astype(np.int64)),
    )


def sparse_weights(projection: Projection, columns: int, dtype: torch.dtype) -> Tensor:
    """W transposed as COO [V_T + 1, columns]."""
    row = np.repeat(np.arange(projection.student_size), np.diff(projection.crow))
    index = torch.from_numpy(np.stack([projection.col.astype(np.int64), row]))
    value = torch.tensor(projection.val, dtype=dtype)
    shape = (projection.teacher_size + 1, columns)
    return torch.sparse_coo_tensor(index, value, shape, check_invariants=False).coalesce()
