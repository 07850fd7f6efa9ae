"""The contract of teachers, for every backend: in process, stub servers of every shape, a real vLLM
server by each of its paths, and `mopd serve` around transformers and around vLLM."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from mopd.demo import World
from mopd.serving.hf_scorer import TransformersScorer
from mopd.serving.protocols import VllmCompletions, VllmGenerate
from mopd.serving.score_server import ScoreServer
from mopd.teachers.hf import HfOptions, HfTeacher
from mopd.teachers.remote import RemoteTeacher
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Rollout
from tests.helpers.stub_scorers import ModelScorer
from tests.helpers.stub_server import StubOptions, StubServer
from tests.helpers.teachers import make_rollout_of, remote_teacher
from tests.helpers.vllm_server import VllmServer
from tests.unit.teachers.contract import Case, check_teacher

TOP_K = 16
TAU = 2.0
PATIENT = {"start_s": 60.0, "deadline_s": 60.0}


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
def near(tiny_world: World, student: ChatTokenizer, tokenizer: ChatTokenizer) -> HfTeacher:
    """In this process, at the temperature of `TAU`."""
    return HfTeacher(
        "sort",
        tiny_world.teachers["sort"],
        tokenizer=tokenizer,
        student=student,
        device=torch.device("cpu"),
        options=HfOptions(top_k=TOP_K, temperature=TAU, batch_size=2),
    )


@pytest.fixture(scope="module")
def rollouts(student: ChatTokenizer) -> list[Rollout]:
    return [
        make_rollout_of(student, b"bo 12", content="a much longer prompt than the others have"),
        make_rollout_of(student, b""),
        make_rollout_of(student, "caf\u00e9 \U0001f600 1 2".encode()),
        make_rollout_of(student, b"bo ka bo ka vi 1 2 3", stopped=False),
    ]


@pytest.fixture(scope="module")
def score_server(tiny_world: World) -> Iterator[str]:
    """`mopd serve` with transformers, in a thread; its address."""
    engine = TransformersScorer(tiny_world.teachers["sort"], device=torch.device("cpu"))
    with ScoreServer("127.0.0.1", 0, scorer=engine, token=None) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join(10.0)


def check_far(
    teacher: RemoteTeacher,
    rollouts: Sequence[Rollout],
    *,
    student: ChatTokenizer,
    reference: ModelScorer,
    same: HfTeacher | None = None,
    tolerance: float = 1e-4,
) -> None:
    case = Case(
        teacher=teacher,
        student=student,
        rollouts=rollouts,
        top_k=TOP_K,
        tolerance=tolerance,
        reference=reference,
        same=same,
    )
    try:
        check_teacher(case)
    finally:
        teacher.close()
    assert not teacher.missing and not teacher.events


def test_in_process(
    near: HfTeacher, student: ChatTokenizer, scorer: ModelScorer, rollouts: list[Rollout]
) -> None:
    case = Case(
        teacher=near,
        student=student,
        rollouts=rollouts,
        top_k=TOP_K,
        tolerance=2e-5,
        reference=scorer,
    )
    check_teacher(case)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("vllm", {}),
        ("vllm", {"generate": True}),
        ("openai", {}),
        ("sglang", {}),
        ("sglang", {"lists_models": False}),
        ("trl", {}),
        ("mopd", {}),
    ],
)
def test_behind_a_stub_server(
    shape: str,
    options: dict[str, Any],
    student: ChatTokenizer,
    tokenizer: ChatTokenizer,
    scorer: ModelScorer,
    rollouts: list[Rollout],
) -> None:
    with StubServer(scorer, StubOptions(**options)) as stub:
        teacher = remote_teacher(
            [stub.url], tokenizer=tokenizer, student=student, top_k=TOP_K, shape=shape
        )
        check_far(teacher, rollouts, student=student, reference=scorer, tolerance=2e-5)
        if options.get("generate"):
            assert all("token_ids" in request for request in stub.requests)


def test_behind_mopd_serve(
    score_server: str,
    near: HfTeacher,
    student: ChatTokenizer,
    tokenizer: ChatTokenizer,
    scorer: ModelScorer,
    rollouts: list[Rollout],
) -> None:
    """Log-sum-exps and the identity of the model, too."""
    teacher = remote_teacher(
        [score_server],
        tokenizer=tokenizer,
        student=student,
        top_k=TOP_K,
        shape="mopd",
        endpoint={"temperature": TAU},
    )
    check_far(teacher, rollouts, student=student, reference=scorer, same=near, tolerance=2e-5)


@pytest.mark.vllm
@pytest.mark.parametrize("path", ["completions", "generate"])
def test_behind_a_real_server(
    path: str,
    vllm_server: VllmServer,
    near: HfTeacher,
    student: ChatTokenizer,
    tokenizer: ChatTokenizer,
    scorer: ModelScorer,
    rollouts: list[Rollout],
) -> None:
    endpoint: dict[str, Any] = dict(PATIENT)
    if path == "completions":
        endpoint["protocols"] = (VllmCompletions(),)
    teacher = remote_teacher(
        [vllm_server.url], tokenizer=tokenizer, student=student, top_k=TOP_K, endpoint=endpoint
    )
    (found,) = teacher._replicas.endpoints
    assert type(found.protocol) is (VllmGenerate if path == "generate" else VllmCompletions)
    check_far(teacher, rollouts, student=student, reference=scorer, same=near)


@pytest.mark.vllm
def test_behind_mopd_serve_around_vllm(
    vllm_server: VllmServer,
    near: HfTeacher,
    student: ChatTokenizer,
    tokenizer: ChatTokenizer,
    scorer: ModelScorer,
    rollouts: list[Rollout],
) -> None:
    teacher = remote_teacher(
        [vllm_server.url],
        tokenizer=tokenizer,
        student=student,
        top_k=TOP_K,
        shape="mopd",
        endpoint=PATIENT | {"temperature": TAU},
    )
    check_far(teacher, rollouts, student=student, reference=scorer, same=near)
