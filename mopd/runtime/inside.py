"""Teachers on the student's own ranks: a step's answers are scored by all ranks of a replica.

Called by the main thread of every rank, between gathering a step and collating it. Their scores
depend on the answers and on weights that do not change, so a run that is continued computes them
again instead of keeping them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from mopd.config.schema import RunConfig, TeacherSection
from mopd.metrics.span import Spans
from mopd.runtime.gather import Gathered
from mopd.runtime.payloads import active_teachers
from mopd.runtime.replica import computed_by_lead, refuse_together
from mopd.serving.offload import Offloaded
from mopd.serving.scoring import ScoredSequence
from mopd.serving.wire import RawRows
from mopd.student.frozen import build_frozen
from mopd.student.lora import adapter_off
from mopd.student.model import StudentModel
from mopd.student.parallel import Topology
from mopd.student.scorer import ScoreOptions, score_texts
from mopd.teachers.base import Teacher, TeacherInput
from mopd.teachers.inside import InsideTeacher
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Rollout, TeacherScores

Ready = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One teacher's weights on this rank, and the block within which they can score."""

    model: StudentModel
    options: ScoreOptions
    ready: Ready


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What one teacher is asked in a step; known to the lead."""

    index: list[int]  # among the step's answers
    rollouts: list[Rollout]
    inputs: list[TeacherInput]
    texts: list[ScoredSequence]  # of the inputs


class InsideTeachers:
    """The same engines on every rank; the lead also has ``teachers``, all of the run."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        *,
        topology: Topology,
        teachers: Mapping[str, Teacher],
        spans: Spans,
    ) -> None:
        self._engines = engines
        self._topology = topology
        self._order = tuple(teachers)
        self._teachers = {n: t for n, t in teachers.items() if isinstance(t, InsideTeacher)}
        self._spans = spans

    def judge(self, gathered: Gathered | None) -> Gathered | None:
        """The lead's ``gathered`` with these teachers' scores; None elsewhere. Collective over the
        replica.

        Raises:
            MopdError: on every rank, where one could not begin.
        """
        if not self._engines:
            return gathered
        asked: dict[str, _Asked] = {}

        def ask() -> dict[str, list[ScoredSequence]]:
            assert gathered is not None
            asked.update(_shared_out(self._teachers, gathered))
            return {name: one.texts for name, one in asked.items()}

        with self._spans("inside"):
            texts = computed_by_lead(self._topology, ask)
            rows = {name: self._score(name, texts[name]) for name in self._engines}
            return None if gathered is None else self._joined(gathered, asked, rows)

    def check(self) -> None:
        """Scores fixed texts, whose rows must be a model's. Collective over the replica.

        Raises:
            ConfigError: on every rank.
        """
        for name in self._engines:
            self._check(name)

    def _check(self, name: str) -> None:
        texts = computed_by_lead(self._topology, lambda: self._teachers[name].canary())
        together, alone = self._score(name, texts), self._score(name, texts[:1])

        def verdict() -> bool:
            assert together is not None and alone is not None
            self._teachers[name].check(together, alone[0])
            return True

        computed_by_lead(self._topology, verdict)

    def _score(self, name: str, texts: Sequence[ScoredSequence]) -> list[RawRows] | None:
        engine, problem = self._engines[name], None
        if not texts and engine.model.topology.ep_size == 1:  # replicas with experts wait for us
            return [] if self._topology.is_lead else None
        with ExitStack() as opened:
            try:
                opened.enter_context(engine.ready())
            except Exception as error:
                problem = error
            refuse_together(self._topology, problem, what=f"teachers.{name}: cannot score")
            return score_texts(engine.model, texts, engine.options)

    def _joined(
        self,
        gathered: Gathered,
        asked: Mapping[str, _Asked],
        rows: Mapping[str, list[RawRows] | None],
    ) -> Gathered:
        scores: list[dict[str, TeacherScores]] = [dict(found) for found in gathered.scores]
        troubles = dict(gathered.troubles)
        for name, one in asked.items():
            own = rows[name]
            assert own is not None
            found, missing = self._teachers[name].scores(one.rollouts, one.inputs, one.texts, own)
            for i, each in zip(one.index, found, strict=True):
                scores[i][name] = each
            troubles |= {f"missing/{name}/{reason}": n for reason, n in missing.items()}
        # in the pool's order, whoever scored
        ordered = [{name: s[name] for name in self._order if name in s} for s in scores]
        return replace(gathered, scores=ordered, troubles=troubles)


def _shared_out(teachers: Mapping[str, InsideTeacher], gathered: Gathered) -> dict[str, _Asked]:
    """The answers that are trained on, by the teachers that their prompts name."""
    asked: dict[str, _Asked] = {}
    for name, teacher in teachers.items():
        index = [
            i
            for i, rollout in enumerate(gathered.rollouts)
            if name in rollout.prompt.teachers and rollout.loss_mask.any()
        ]
        rollouts = [gathered.rollouts[i] for i in index]
        inputs = teacher.inputs(rollouts)
        asked[name] = _Asked(
            index=index, rollouts=rollouts, inputs=inputs, texts=teacher.texts(inputs)
        )
    return asked


def build_engines(
    config: RunConfig, student: StudentModel, tokenizers: Mapping[str, ChatTokenizer]
) -> dict[str, Engine]:
    """The weights of the recipe's `megatron` and `self` teachers on this rank."""
    engines: dict[str, Engine] = {}
    for name, section in active_teachers(config).items():
        if section.backend.type not in ("megatron", "self"):
            continue
        model, ready = (
            _megatron(config, section, student.topology)
            if section.backend.type == "megatron"
            else (student, _without_adapter(student))
        )
        options = ScoreOptions(
            top_k=config.distillation.top_k,
            temperature=config.distillation.temperature,
            vocab_size=tokenizers[name].vocabulary.size,
            max_tokens=section.backend.max_tokens_per_micro_batch,
        )
        engines[name] = Engine(model=model, options=options, ready=ready)
    return engines


def _megatron(
    config: RunConfig, section: TeacherSection, topology: Topology
) -> tuple[StudentModel, Ready]:
    model = build_frozen(
        Path(str(section.model)),
        section=config.student,
        dtype=section.backend.dtype or config.student.dtype,
        topology=topology,
    )
    if not section.backend.offload:
        return model, nullcontext
    return model, Offloaded(model.chunks).loaded


def _without_adapter(student: StudentModel) -> Ready:
    return lambda: adapter_off(student)
