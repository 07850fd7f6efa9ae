"""Rank functions around teachers on the student's own ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch

from mopd.config.schema import RunConfig
from mopd.metrics.span import Spans
from mopd.runtime import loop
from mopd.runtime.gather import Gathered
from mopd.runtime.inside import InsideTeachers, build_engines
from mopd.runtime.teachers import build_pool
from mopd.student.model import StudentModel, build_student
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Rollout, TeacherScores
from tests.dist.student.worlds import Layout, join
from tests.helpers.runs import train_here
from tests.helpers.teachers import make_rollout_of

RESPONSES = (b"bo 12", b"ka vi bo 12345 ka vi", b"", b"x\xff\xfe y", b"9 8 7 6 5 4 3 2 1")


@dataclass(frozen=True)
class World:
    """The directories of an embedded world, and what a recipe says about its teacher."""

    student: str
    teacher: str | None
    layout: Layout = field(default_factory=Layout)
    section: dict[str, Any] = field(default_factory=dict)
    distillation: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> RunConfig:
        values = {
            "student": {
                "model": self.student,
                "parallel": self.layout.section.model_dump(),
                "lora": {"rank": 4 if self.teacher is None else None},
            },
            "teachers": {"sort": {"model": self.teacher} | self.section},
            "distillation": {"top_k": 8, "temperature": 2.0} | self.distillation,
            "rollout": {"max_new_tokens": 16},
        }
        return RunConfig.model_validate(values)


def rollouts(student: ChatTokenizer) -> list[Rollout]:
    """The third asks for fewer entries, the fourth is not trained on, the last has no teacher."""
    found = [make_rollout_of(student, text) for text in RESPONSES]
    for i, change in enumerate(({}, {}, {"top_k": 3}, {}, {"teachers": ()})):
        prompt = replace(found[i].prompt, private={"hint": "ka 9"}, **change)
        found[i] = replace(found[i], prompt=prompt)
    found[3] = replace(found[3], loss_mask=found[3].loss_mask & False)
    return found


def tokenizers(world: World) -> tuple[ChatTokenizer, ChatTokenizer]:
    """The student's and the teacher's."""
    return ChatTokenizer.load(world.student), ChatTokenizer.load(world.teacher or world.student)


def open_inside(world: World) -> tuple[InsideTeachers, StudentModel]:
    config, (student, teacher) = world.config, tokenizers(world)
    topology = join(world.layout)
    model = build_student(config.student, topology=topology)
    engines = build_engines(config, model, {"sort": teacher})
    teachers = {}
    if topology.is_lead:
        device = torch.device("cpu")
        teachers = build_pool(config, {"sort": teacher}, student=student, device=device).teachers
    return InsideTeachers(engines, topology=topology, teachers=teachers, spans=Spans()), model


def scores_of_hf(world: World, answers: Sequence[Rollout]) -> list[dict[str, TeacherScores]]:
    """What type hf says of the same; the answers that are not trained on are left out."""
    section = world.section | {"backend": {"type": "hf"}}
    section["model"] = world.teacher or world.student
    config = replace(world, section=section).config
    student, teacher = tokenizers(world)
    pool = build_pool(config, {"sort": teacher}, student=student, device=torch.device("cpu"))
    kept = [i for i, answer in enumerate(answers) if answer.loss_mask.any()]
    found: list[dict[str, TeacherScores]] = [{} for _ in answers]
    for i, one in zip(kept, pool.score([answers[i] for i in kept]), strict=True):
        found[i] = one
    return found


def judge(world: World) -> Gathered | None:
    """Checked and asked; the student of type self has an adapter that learned something."""
    found, model = open_inside(world)
    if world.teacher is None:
        learn(model)
    found.check()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gathered = None
    if model.topology.is_lead:
        answers = rollouts(tokenizers(world)[0])
        gathered = Gathered(step=0, rollouts=answers, scores=[{} for _ in answers])
    gathered = found.judge(gathered)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    return gathered


def learn(model: StudentModel) -> None:
    """Adapters that say something, alike on all ranks where they are copies."""
    torch.manual_seed(3)
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)


def judge_with_a_rank_that_cannot(world: World, rank: int) -> str:
    """What each rank raises where one cannot bring its weights, or the lead its texts."""
    found, model = open_inside(world)

    def fail(*_: Any) -> Any:
        raise OSError("no room")

    gathered = None
    if model.topology.is_lead:
        answers = rollouts(tokenizers(world)[0])
        gathered = Gathered(step=0, rollouts=answers, scores=[{} for _ in answers])
    if rank == model.topology.rank:
        found._engines["sort"] = replace(found._engines["sort"], ready=fail)  # type: ignore[index]
    elif rank < 0 and model.topology.is_lead:
        found._teachers["sort"].texts = fail  # type: ignore[method-assign]
    try:
        found.judge(gathered)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def check_damaged(world: World, value: float, rank: int) -> str:
    """What each rank raises at the start where a weight of one is not a number."""
    found, model = open_inside(world)
    engine = found._engines["sort"]
    if rank == model.topology.rank:
        with engine.ready():
            engine.model.chunks[0].decoder.layers[0].mlp.linear_fc2.weight.data[0, 0] = value
    try:
        found.check()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def train_and_die(recipe: str, overrides: list[str], steps: int) -> None:
    """`train_here` whose process is killed once it has logged ``steps`` steps."""
    logged, log_step = [], loop.log_step

    def log(*args: Any, **options: Any) -> None:
        log_step(*args, **options)
        logged.append(1)
        if len(logged) == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    with patch.object(loop, "log_step", log):
        train_here(recipe, overrides)
