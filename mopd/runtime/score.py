"""Texts through one teacher of a recipe, with the parts and the numbers of a training step.

The run is built as ever (`mopd.runtime.build`), for one process, one teacher, and answers that come
with the data; its losses are computed and nothing is trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mopd.align.boundaries import chunk_sizes
from mopd.align.tokens import TextAlignment
from mopd.config.backends import RolloutBackendSection
from mopd.config.cluster import ClusterSection
from mopd.config.schema import (
    CheckpointSection,
    DataSection,
    EvaluateSection,
    ParallelSection,
    RolloutSection,
    RunConfig,
)
from mopd.errors import ConfigError
from mopd.runtime.build import Run, build_run
from mopd.runtime.gather import Gathered
from mopd.runtime.report import mean_of
from mopd.runtime.servers import Servers
from mopd.student.parallel import shutdown
from mopd.types import Rollout, TeacherScores

KINDS = ("1-1", "1-n", "n-1", "n-m")  # student tokens - teacher tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredChunk:
    """Student tokens ``student`` and teacher tokens ``teacher`` of equal text, as [begin, end)."""

    kind: str
    kept: bool  # False: the two sides do not say the same, and no row comes of it
    student: tuple[int, int]
    teacher: tuple[int, int]
    student_logprob: float
    teacher_logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredText:
    """One answer. ``scores`` and ``alignment`` are None where the teacher did not score it.

    ``loss`` is the objective (this teacher's loss times its scale, and the cross entropy where the
    recipe has one), ``metrics`` its parts by their names in metrics.jsonl; all None where the loss
    needs the log-probabilities of a sampler.
    """

    rollout: Rollout
    student_logprobs: np.ndarray  # [S] float32, at temperature 1
    scores: TeacherScores | None
    alignment: TextAlignment | None
    loss: float | None
    metrics: Mapping[str, float | None]

    def chunks(self) -> list[ScoredChunk]:
        if self.alignment is None or self.scores is None:
            return []
        found, own = self.alignment.alignment, self.student_logprobs
        sizes = chunk_sizes(found)
        kinds = 2 * (sizes[:, 0] > 1) + (sizes[:, 1] > 1)
        edges = (found.student_starts.tolist(), found.teacher_starts.tolist())
        return [
            ScoredChunk(
                kind=KINDS[kinds[c]],
                kept=bool(self.alignment.kept[c]),
                student=(edges[0][c], edges[0][c + 1]),
                teacher=(edges[1][c], edges[1][c + 1]),
                student_logprob=float(own[edges[0][c] : edges[0][c + 1]].sum()),
                teacher_logprob=float(self.scores.logprobs[edges[1][c] : edges[1][c + 1]].sum()),
            )
            for c in range(found.num_chunks)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """All texts, and their losses as one step would have them (``loss``, ``metrics``)."""

    texts: Sequence[ScoredText]
    loss: float | None
    metrics: Mapping[str, float | None]


def for_one_teacher(config: RunConfig, teacher: str, *, data: Path, directory: Path) -> RunConfig:
    """The recipe with ``teacher`` alone, who judges every row of ``data``; its run is temporary.

    Raises:
        ConfigError: there is no such teacher.
    """
    if teacher not in config.teachers:
        raise ConfigError(
            f"--teacher {teacher}: is none of the recipe's; choose one of "
            f"{', '.join(config.teachers)}"
        )
    chosen = config.teachers[teacher]
    chosen = chosen.model_copy(update={"domains": (), "pool": None, "weight": chosen.weight or 1.0})
    rollout = RolloutSection(
        max_new_tokens=config.rollout.max_new_tokens,
        stop_token_ids=config.rollout.stop_token_ids,
        temperature=config.rollout.temperature,
        backend=RolloutBackendSection(type="dataset"),
    )
    update = {
        "teachers": {teacher: chosen},
        "rollout": rollout,
        "distillation": config.distillation.model_copy(update={"default_teacher": None}),
        "student": config.student.model_copy(update={"parallel": ParallelSection()}),
        "data": config.data.model_copy(
            update={"path": str(data), "heldout_path": None, "validation_path": str(data)}
        ),
        "run": config.run.model_copy(update={"dir": str(directory), "name": "score"}),
        "evaluate": EvaluateSection(),
        "checkpoint": CheckpointSection(),
        "launcher": "torchrun",
        "cluster": ClusterSection(),
        "pools": {},
    }
    return config.model_copy(update=update)


def write_rows(path: Path, texts: Sequence[str], *, prompt: str, data: DataSection) -> DataSection:
    """Plain answers to one prompt as a data file; the section that reads it."""
    section = data.model_copy(update={"prompt_key": None, "messages_key": "messages"})
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(texts, 1):
            messages = [{"role": "user", "content": prompt}]
            row = {"id": f"line-{number}", "messages": messages, section.response_key: text}
            file.write(json.dumps(row) + "\n")
    return section


@contextmanager
def scoring_run(config: RunConfig) -> Iterator[Run]:
    """What `for_one_teacher` describes, built; everything is closed behind it."""
    with ExitStack() as opened:
        opened.callback(shutdown)
        run = build_run(config, Servers(config))
        for part in (run.servers, run.turns, run.pool, run.feed):
            if part is not None:
                opened.callback(part.close)
        yield run


def score_texts(run: Run) -> Scored:
    """Every row of data.path, in order, as the teacher and the student's current model see it."""
    feed, teacher = run.eval_feed, next(iter(run.config.teachers))
    assert feed is not None
    gathered = run.inside.judge(feed.given(run.validation))
    assert gathered is not None
    has_loss = run.pairs[teacher].loss != "opd"
    texts = [
        _scored(run, teacher, rollout, scores.get(teacher), has_loss=has_loss)
        for rollout, scores in zip(gathered.rollouts, gathered.scores, strict=True)
    ]
    loss, metrics = _losses(run, gathered) if has_loss else (None, {})
    return Scored(texts=texts, loss=loss, metrics=metrics)


def _scored(
    run: Run, teacher: str, rollout: Rollout, scores: TeacherScores | None, *, has_loss: bool
) -> ScoredText:
    assert run.eval_feed is not None
    ids = np.concatenate([rollout.prompt_ids, rollout.token_ids])
    own = run.student.logprobs(ids, vocab_size=run.tokenizer.vocabulary.size)
    alignment = None if scores is None else run.eval_feed.aligner.alignment(rollout, scores)
    loss, metrics = None, {}
    if has_loss:
        mine = {} if scores is None else {teacher: scores}
        loss, metrics = _losses(run, Gathered(step=0, rollouts=[rollout], scores=[mine]))
    return ScoredText(
        rollout=rollout,
        student_logprobs=own[len(rollout.prompt_ids) - 1 :],
        scores=scores,
        alignment=alignment,
        loss=loss,
        metrics=metrics,
    )


def _losses(run: Run, gathered: Gathered) -> tuple[float | None, dict[str, float | None]]:
    """As a step of these answers has them; None where nobody judged a token."""
    assert run.eval_feed is not None
    batch = run.eval_feed.collate(gathered)
    result = run.student.evaluate(batch)
    metrics: dict[str, float | None] = {}
    for name in result.metrics:
        if name.startswith(("loss/", "kl/")):
            mean, count = mean_of(name, result.metrics, batch)
            metrics[name] = mean if count > 0 else None
    return (result.loss if any(v is not None for v in metrics.values()) else None), metrics
