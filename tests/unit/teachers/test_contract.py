"""The contract of teachers, for every backend: in process, a stub server, a real vLLM server."""

from __future__ import annotations

import pytest
import torch

from mopd.demo import World
from mopd.serving.reply import Shape
from mopd.teachers.hf import HfTeacher
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Rollout
from tests.helpers.stub_server import ModelScorer, StubServer
from tests.helpers.teachers import make_rollout_of, remote_teacher
from tests.helpers.vllm_server import VllmServer
from tests.unit.teachers.contract import Case, check_teacher


@pytest.fixture(scope="module")
def student(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.student)


@pytest.fixture(scope="module")
def tokenizer(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.teachers["sort"])


@pytest.fixture(scope="module")
def scorer(tiny_world: World, tokenizer: ChatTokenizer) -> ModelScorer:
    return ModelScorer(tiny_world.teachers["sort"], vocab_size=tokenizer.vocabulary.size)


@pytest.fixture(scope="module")
def rollouts(student: ChatTokenizer) -> list[Rollout]:
    return [
        make_rollout_of(student, b"bo 12", content="a much longer prompt than the others have"),
        make_rollout_of(student, b""),
        make_rollout_of(student, "caf\u00e9 \U0001f600 1 2".encode()),
        make_rollout_of(student, b"bo ka bo ka vi 1 2 3", stopped=False),
    ]


def test_in_process(
    tiny_world: World,
    student: ChatTokenizer,
    tokenizer: ChatTokenizer,
    scorer: ModelScorer,
    rollouts: list[Rollout],
) -> None:
    teacher = HfTeacher(
        "sort",
        tiny_world.teachers["sort"],
        tokenizer=tokenizer,
        student=student,
        device=torch.device("cpu"),
        top_k=16,
        temperature=1.0,
        batch_size=2,
    )
    case = Case(
        teacher=teacher,
        student=student,
        rollouts=rollouts,
        top_k=16,
        tolerance=2e-5,
        reference=scorer,
    )
    check_teacher(case)


@pytest.mark.parametrize("shape", ["vllm", "openai"])
def test_behind_a_server(
    shape: Shape,
    student: ChatTokenizer,
    tokenizer: ChatTokenizer,
    scorer: ModelScorer,
    rollouts: list[Rollout],
) -> None:
    with StubServer(scorer) as stub:
        teacher = remote_teacher(
            [stub.url], tokenizer=tokenizer, student=student, top_k=16, shape=shape
        )
        case = Case(
            teacher=teacher,
            student=student,
            rollouts=rollouts,
            top_k=16,
            tolerance=2e-5,
            reference=scorer,
        )
        check_teacher(case)
        teacher.close()


@pytest.mark.vllm
def test_behind_a_real_server(
    vllm_server: VllmServer, student: ChatTokenizer, scorer: ModelScorer, rollouts: list[Rollout]
) -> None:
    tokenizer = ChatTokenizer.load(vllm_server.model_dir)
    teacher = remote_teacher(
        [vllm_server.url],
        tokenizer=tokenizer,
        student=student,
        top_k=16,
        endpoint={"start_s": 60.0, "deadline_s": 60.0},
    )
    case = Case(
        teacher=teacher,
        student=student,
        rollouts=rollouts,
        top_k=16,
        tolerance=1e-4,
        reference=scorer,
    )
    check_teacher(case)
    teacher.close()
