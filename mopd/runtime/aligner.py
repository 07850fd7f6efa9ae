"""One answer and what its teachers said of it -> rows on the student's axis, with the counts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mopd.align.batch import Sample
from mopd.align.boundaries import align_positions, chunk_counts
from mopd.align.canonical import own_next
from mopd.align.payload import PayloadOptions, column_peaks, shared_columns, teacher_rows
from mopd.align.positions import canonical_prefix
from mopd.align.select import byte_scores, select
from mopd.align.tokens import TextAlignment, TokenText, align_tokens
from mopd.runtime.collate import Objective
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Rollout, TeacherRows, TeacherScores


@dataclass(slots=True)
class Tally:
    """Sums and counts of one step's metrics on this replica."""

    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        self.sums[name] += value
        self.counts[name] += count

    def metrics(self) -> dict[str, tuple[float, float]]:
        """name -> (sum, count)."""
        return {name: (self.sums[name], self.counts[name]) for name in self.sums}


def _alone(values: np.ndarray) -> np.ndarray:
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignOptions:
    """``by_position`` is the negative control, ``canonical_prefix`` trains no further than that.

    ``shared_columns`` keeps so many columns of whole rows, the same in a whole step: for that
    ``max_over_replicas`` takes the larger of a vector over the lead ranks of all replicas.
    """

    by_position: bool = False
    canonical_prefix: bool = False
    shared_columns: int | None = None
    max_over_replicas: Callable[[np.ndarray], np.ndarray] = _alone


class Aligner:
    """`samples` turns a step's answers and replies into rows; ``chunks`` counts over the run."""

    def __init__(
        self,
        *,
        student: ChatTokenizer,
        teachers: Mapping[str, ChatTokenizer],
        payload: Mapping[str, PayloadOptions],
        objective: Objective,
        options: AlignOptions,
    ) -> None:
        self._student = student
        self._teachers = teachers
        self._payload = payload
        self._objective = objective
        self._options = options
        self.chunks: dict[str, Counter[str]] = {name: Counter() for name in payload}

    def samples(
        self,
        rollouts: Sequence[Rollout],
        scores: Sequence[Mapping[str, TeacherScores]],
        tally: Tally,
    ) -> list[Sample]:
        """One per answer, in order."""
        payload = self._with_columns(scores)
        return [
            self._sample(rollout, per_teacher, payload, tally)
            for rollout, per_teacher in zip(rollouts, scores, strict=True)
        ]

    def _with_columns(
        self, scores: Sequence[Mapping[str, TeacherScores]]
    ) -> Mapping[str, PayloadOptions]:
        """The same columns on every replica: the reduction runs for every teacher, heard or not."""
        if self._options.shared_columns is None:
            return self._payload
        chosen = {}
        for name, options in self._payload.items():
            said = [per_teacher[name] for per_teacher in scores if name in per_teacher]
            peaks = column_peaks(said, self._teachers[name].vocabulary.size)
            peaks = self._options.max_over_replicas(peaks)
            columns = shared_columns(peaks, self._options.shared_columns)
            chosen[name] = replace(options, columns=columns)
        return chosen

    def _sample(
        self,
        rollout: Rollout,
        scores: Mapping[str, TeacherScores],
        payload: Mapping[str, PayloadOptions],
        tally: Tally,
    ) -> Sample:
        trained = self.trained(rollout)
        canonical = self._canonical(rollout, payload)
        rows: dict[str, TeacherRows] = {}
        said: dict[str, np.ndarray] = {}
        for name, score in scores.items():
            found = self.alignment(rollout, score)
            self._count(rollout, name, found, tally)
            trainable = found.trainable(trained)
            report: dict[str, tuple[float, float]] = {}
            rows[name] = teacher_rows(
                score,
                found.alignment,
                student_ids=rollout.token_ids,
                trainable=trainable,
                options=payload[name],
                sampling_logprobs=rollout.logprobs,
                canonical_ids=canonical,
                report=report,
            )
            for metric, (total, count) in report.items():
                tally.add(f"{metric}/{name}", total, count)
            if self._objective.selection is not None:
                kind = self._objective.selection_score
                said[name] = byte_scores(score, found.alignment, kind)
        if self._objective.selection is not None and len(rows) > 1:
            rows = select(
                rows, said, mode=self._objective.selection, sharpness=self._objective.sharpness
            )
        _describe(rollout, rows, trained, tally)
        for name in self._payload:
            judged = len(np.unique(rows[name].token_position)) if name in rows else 0
            tally.add(f"token_share/{name}", judged, len(rollout.token_ids))
        return Sample(rollout=rollout, rows=rows, trained=trained)

    def trained(self, rollout: Rollout) -> np.ndarray:
        """[S] bool: tokens that may be trained on, whoever judges them."""
        if not self._options.canonical_prefix:
            return rollout.loss_mask
        own = self._student.vocabulary.encode(rollout.response)
        if rollout.finish_reason == "stop":
            own = [*own, self._student.eos_id]
        kept = canonical_prefix(rollout.token_ids, np.asarray(own))
        return rollout.loss_mask & (np.arange(len(rollout.token_ids)) < kept)

    def _canonical(
        self, rollout: Rollout, payload: Mapping[str, PayloadOptions]
    ) -> np.ndarray | None:
        """[S] the student's own next tokens, where the path terms of a teacher ask for them."""
        if not any(one.path is not None and one.path.canonical for one in payload.values()):
            return None
        ended = rollout.finish_reason == "stop"
        return own_next(self._student.vocabulary, rollout.response, rollout.byte_ends, ended=ended)

    def _count(self, rollout: Rollout, name: str, found: TextAlignment, tally: Tally) -> None:
        covered = found.covered
        tally.add(f"alignment/{name}", covered, len(rollout.token_ids))
        for method in ("offsets", "strings"):
            tally.add(f"alignment_{method}/{name}", float(found.method == method))
        tally.add(f"alignment_mismatch/{name}", float(found.mismatch is not None))
        counts = self.chunks[name]
        for kind, (chunks, tokens) in chunk_counts(found.alignment, kept=found.kept).items():
            counts[f"chunks {kind}"] += chunks
            counts[f"tokens {kind}"] += tokens
            tally.add(f"alignment_{kind}/{name}", tokens, len(rollout.token_ids))
        counts["tokens unaligned"] += len(rollout.token_ids) - covered

    def alignment(self, rollout: Rollout, scores: TeacherScores) -> TextAlignment:
        """The chunks of an answer and one teacher's reading of it, as the step is trained on."""
        if self._options.by_position:
            by_index = align_positions(len(rollout.token_ids), len(scores.token_ids))
            every = np.ones(by_index.num_chunks, dtype=bool)
            return TextAlignment(alignment=by_index, kept=every, method="bytes")
        teacher = self._teachers[scores.teacher]
        student_stops = rollout.finish_reason == "stop"
        teacher_stops = len(scores.token_ids) > 0 and scores.token_ids[-1] == teacher.eos_id
        written = slice(-1) if student_stops else slice(None)
        read = slice(-1) if teacher_stops else slice(None)
        return align_tokens(
            TokenText(
                ids=rollout.token_ids[written],
                vocabulary=self._student.vocabulary,
                byte_ends=rollout.byte_ends[written],
            ),
            TokenText(
                ids=scores.token_ids[read],
                vocabulary=teacher.vocabulary,
                byte_ends=scores.byte_ends[read],
            ),
            both_end_turn=bool(student_stops and teacher_stops),
        )


def _describe(
    rollout: Rollout, rows: Mapping[str, TeacherRows], trained: np.ndarray, tally: Tally
) -> None:
    """``masked``: trainable tokens that no teacher judged."""
    size = len(rollout.token_ids)
    judged, boundary = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    for of_teacher in rows.values():
        judged[of_teacher.token_position] = True
        boundary[of_teacher.position] = True
    tally.add("masked", float((trained & ~judged).sum()), size)
    tally.add("interior", float((judged & ~boundary).sum()), size)
    tally.add("untrained", float((~trained).sum()), size)
