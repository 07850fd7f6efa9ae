"""Random texts, their teacher's rows and alignments, for what turns scores into payloads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mopd.align.boundaries import align_bytes
from mopd.align.payload import PayloadOptions, teacher_rows
from mopd.projection import ProjectionOptions, build_projection
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import Alignment, Projection, TeacherRows, TeacherScores
from tests.helpers.vocabularies import byte_level

MAX_LENGTH = 4


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One sampled text; the student's tokens need not be canonical."""

    student: Vocabulary
    teacher: Vocabulary
    projection: Projection
    student_ids: np.ndarray
    scores: TeacherScores  # the whole vocabulary, ``topk_ids`` None
    alignment: Alignment

    def listed(self, k: int) -> TeacherScores:
        """The same with the ``k`` most likely tokens listed."""
        return listed(self.scores, k)

    def rows(self, scores: TeacherScores, options: PayloadOptions) -> TeacherRows:
        return teacher_rows(
            scores,
            self.alignment,
            student_ids=self.student_ids,
            trainable=np.ones(len(self.student_ids), dtype=bool),
            options=options,
        )


def random_problem(
    student_tokens: list[str], teacher_tokens: list[str], letters: str, *, seed: int, size: int = 40
) -> Problem:
    """A text of ``size`` letters; the teacher's rows favour the tokens that both texts use."""
    generator = np.random.default_rng(seed)
    student, teacher = byte_level(student_tokens), byte_level(teacher_tokens)
    text = "".join(generator.choice(list(letters), size=size)).encode()
    ids = _random_split(student, text, generator)
    theirs = np.array(teacher.encode(text), dtype=np.int32)
    logits = generator.normal(size=(len(theirs), teacher.size)) - 5.0
    used = [*theirs.tolist(), *(teacher.by_bytes[word.encode()] for word in teacher_tokens)]
    logits[:, used] += 5.0
    logs = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    ends = teacher.byte_ends(theirs)
    return Problem(
        student=student,
        teacher=teacher,
        projection=build_projection(
            student, teacher, ProjectionOptions(max_length=MAX_LENGTH, gamma=0.0)
        ),
        student_ids=ids,
        scores=TeacherScores(
            teacher="t",
            model_fingerprint="f",
            token_ids=theirs,
            byte_ends=ends,
            logprobs=logs[np.arange(len(theirs)), theirs].astype(np.float32),
            topk_ids=None,
            topk_logprobs=logs.astype(np.float32),
            log_tail=np.full(len(theirs), -np.inf, dtype=np.float32),
            lse=None,
            valid=np.ones(len(theirs), dtype=bool),
        ),
        alignment=align_bytes(student.byte_ends(ids), ends, both_end_turn=False),
    )


def _random_split(student: Vocabulary, text: bytes, generator: np.random.Generator) -> np.ndarray:
    ids: list[int] = []
    at = 0
    while at < len(text):
        fitting = [text[at : at + n] for n in range(1, 6) if text[at : at + n] in student.by_bytes]
        ids.append(student.by_bytes[fitting[generator.integers(len(fitting))]])
        at += len(student.token_bytes[ids[-1]])
    return np.array(ids)


def listed(scores: TeacherScores, k: int) -> TeacherScores:
    """Whole rows -> the ``k`` largest entries and a tail."""
    assert scores.topk_ids is None
    ids = np.argsort(-scores.topk_logprobs, axis=1, kind="stable")[:, :k].astype(np.int32)
    logs = np.take_along_axis(scores.topk_logprobs, ids.astype(np.int64), axis=1)
    outside = scores.topk_logprobs.astype(np.float64).copy()
    np.put_along_axis(outside, ids.astype(np.int64), -np.inf, axis=1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(outside).sum(axis=1))
    return replace(scores, topk_ids=ids, topk_logprobs=logs, log_tail=tail.astype(np.float32))


def dense(rows: TeacherRows, size: int) -> np.ndarray:
    """[R, size + 1] probabilities of listed rows, the tail last."""
    found = np.zeros((len(rows.position), size + 1))
    probs = np.exp(rows.topk_logprobs.astype(np.float64))
    ids = rows.topk_ids
    if ids is None:
        ids = np.arange(size)
    ids = np.broadcast_to(ids, probs.shape)
    for r, (row, p) in enumerate(zip(ids, probs, strict=True)):
        np.add.at(found[r], row[row >= 0], p[row >= 0])
    found[:, size] = np.exp(rows.log_tail.astype(np.float64))
    return found


def native_dense(rows: TeacherRows, size: int) -> np.ndarray:
    """[O, size + 1] probabilities of native rows, the tail last."""
    return dense(
        replace(
            rows,
            position=rows.native_position,
            topk_ids=rows.native_ids,
            topk_logprobs=rows.native_logprobs,
            log_tail=rows.native_log_tail,
        ),
        size,
    )
