"""A teacher that IS the student, written in the teacher's own tokens: what every loss must accept.

The student writes one or two tokens, always canonically, from random distributions. The teacher's
rows follow by exact marginalisation over all texts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from mopd.align.boundaries import align_bytes
from mopd.align.paths import PathOptions
from mopd.align.payload import PayloadOptions, teacher_rows
from mopd.losses.ctkd import CtkdLoss
from mopd.losses.divergence import Divergence
from mopd.losses.vocab import VocabShard
from mopd.projection import ProjectionOptions, ProjectionShard, build_projection
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import Projection, TeacherScores
from tests.helpers.losses import run_head
from tests.helpers.vocabularies import byte_level

Ids = tuple[int, ...]
MAX_LENGTH = 4
IMPOSSIBLE = -60.0  # a logit that is finite, so that a wrong gradient on it shows


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """``gradient``: its largest entry. ``same_past``: both prefixes stand for the same texts."""

    student: Ids
    teacher: Ids
    first: bool
    same_past: bool
    value: float
    gradient: float


def boundaries(
    student_tokens: list[str], teacher_tokens: list[str], letters: str, *, seed: int
) -> list[Boundary]:
    """Every boundary of every text, with the real payload and the real loss."""
    student, teacher = byte_level(student_tokens), byte_level(teacher_tokens)
    projection = build_projection(
        student, teacher, ProjectionOptions(max_length=MAX_LENGTH, gamma=0.0)
    )
    words = [student.by_bytes[word.encode()] for word in [*letters, *student_tokens]]
    next_token, texts = _student_process(student, words, np.random.default_rng(seed))
    spelled = {ids: (*teacher.encode(student.decode(ids)), teacher.eos_id) for ids in texts}
    rows: defaultdict[Ids, np.ndarray] = defaultdict(lambda: np.zeros(teacher.size))
    for ids, probability in texts.items():
        for k, token in enumerate(spelled[ids]):
            rows[spelled[ids][:k]][token] += probability
    found: list[Boundary] = []
    for ids in texts:
        scores = _scores(spelled[ids], rows, teacher)
        logits = np.full((len(ids), student.size), IMPOSSIBLE)
        for k in range(len(ids)):
            for token, probability in next_token[ids[:k]].items():
                logits[k, token] = np.log(probability)
        for position, start, value, gradient in _losses(student, ids, scores, logits, projection):
            mine = {t for t in texts if t[:position] == ids[:position]}
            theirs = {t for t in texts if spelled[t][:start] == spelled[ids][:start]}
            found.append(
                Boundary(
                    student=ids,
                    teacher=spelled[ids],
                    first=position == 0,
                    same_past=mine == theirs,
                    value=value,
                    gradient=gradient,
                )
            )
    return found


def _student_process(
    student: Vocabulary, words: list[int], generator: np.random.Generator
) -> tuple[dict[Ids, dict[int, float]], dict[Ids, float]]:
    """(prefix -> next token -> probability, whole answer -> probability)."""
    next_token: dict[Ids, dict[int, float]] = {}
    texts: dict[Ids, float] = {}

    def grow(prefix: Ids, probability: float) -> None:
        options = [
            word
            for word in words
            if len(prefix) < 2
            and student.encode(student.decode([*prefix, word])) == [*prefix, word]
        ]
        options += [student.eos_id] if prefix else []
        share = generator.dirichlet(np.ones(len(options)))
        next_token[prefix] = dict(zip(options, share.tolist(), strict=True))
        for token, part in next_token[prefix].items():
            if token == student.eos_id:
                texts[(*prefix, token)] = probability * part
            else:
                grow((*prefix, token), probability * part)

    grow((), 1.0)
    return next_token, texts


def _scores(ids: Ids, rows: Mapping[Ids, np.ndarray], teacher: Vocabulary) -> TeacherScores:
    table = np.stack([rows[ids[:k]] / rows[ids[:k]].sum() for k in range(len(ids))])
    with np.errstate(divide="ignore"):
        logs = np.log(table)
    return TeacherScores(
        teacher="t",
        model_fingerprint="exact",
        token_ids=np.array(ids, dtype=np.int32),
        byte_ends=teacher.byte_ends(ids),
        logprobs=logs[np.arange(len(ids)), list(ids)],
        topk_ids=np.tile(np.arange(teacher.size, dtype=np.int32), (len(ids), 1)),
        topk_logprobs=logs,
        log_tail=np.full(len(ids), -np.inf),
        lse=None,
        valid=np.ones(len(ids), dtype=bool),
    )


def _losses(
    student: Vocabulary,
    ids: Ids,
    scores: TeacherScores,
    logits: np.ndarray,
    projection: Projection,
) -> list[tuple[int, int, float, float]]:
    """(student position, teacher position, value, largest gradient entry) of each boundary."""
    alignment = align_bytes(student.byte_ends(ids)[:-1], scores.byte_ends[:-1], both_end_turn=True)
    shard = ProjectionShard(projection, start=0, end=student.size, device=torch.device("cpu"))
    result = []
    for chunk in range(alignment.num_chunks):
        begin, start = int(alignment.student_starts[chunk]), int(alignment.teacher_starts[chunk])
        rows = teacher_rows(
            scores,
            alignment,
            student_ids=np.array(ids),
            trainable=np.arange(len(ids)) == begin,
            options=PayloadOptions(
                temperature=1.0,
                fold=projection.fold,
                path=PathOptions(
                    trie=projection.trie,
                    fold=projection.fold,
                    max_length=MAX_LENGTH,
                ),
            ),
        )
        value, gradient = run_head(
            CtkdLoss(
                projection=shard,
                divergence=Divergence(kind="forward_kl"),
                temperature=1.0,
                value_scale=1.0,
                lambda_chunk=0.0,
            ),
            torch.as_tensor(logits),
            rows,
            shard=VocabShard(start=0, size=student.size, vocab_size=student.size),
            projection=shard,
        )
        result.append((begin, start, float(value), float(gradient.abs().max())))
    return result
