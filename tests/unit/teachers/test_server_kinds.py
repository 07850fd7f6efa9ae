"""Teachers behind each kind of server: which path is taken, whole rows, identities, refusals."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from mopd.demo import World
from mopd.errors import TeacherError
from mopd.serving.hf_scorer import TransformersScorer
from mopd.serving.protocols import VllmCompletions, VllmGenerate
from mopd.serving.score_server import ScoreServer
from mopd.teachers.hf import HfOptions, HfTeacher
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Rollout
from tests.helpers.stub_scorers import PrefixScorer
from tests.helpers.stub_server import StubOptions, StubServer, send_json
from tests.helpers.teachers import make_rollout_of, remote_teacher

TAU = 2.0


@pytest.fixture(scope="module")
def student(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.student)


@pytest.fixture(scope="module")
def tokenizer(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.teachers["sort"])


@pytest.fixture(scope="module")
def scorer(tokenizer: ChatTokenizer) -> PrefixScorer:
    return PrefixScorer(tokenizer.vocabulary.size)


@pytest.fixture(scope="module")
def rollouts(student: ChatTokenizer) -> list[Rollout]:
    return [make_rollout_of(student, answer) for answer in (b"bo 12", b"", b"1 2 3 4 5 ka")]


@pytest.fixture(scope="module")
def engine(tiny_world: World) -> TransformersScorer:
    return TransformersScorer(tiny_world.teachers["sort"], device=torch.device("cpu"))


def serve(engine: TransformersScorer, token: str | None = None) -> Iterator[str]:
    with ScoreServer("127.0.0.1", 0, scorer=engine, token=token) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join(10.0)


@pytest.fixture(scope="module")
def score_server(engine: TransformersScorer) -> Iterator[str]:
    yield from serve(engine)


def near(world: World, student: ChatTokenizer, *, top_k: int | None) -> HfTeacher:
    path = world.teachers["sort"]
    return HfTeacher(
        "sort",
        path,
        tokenizer=ChatTokenizer.load(path),
        student=student,
        device=torch.device("cpu"),
        options=HfOptions(top_k=top_k, temperature=TAU, batch_size=4),
    )


def test_whole_rows_of_a_real_server(
    score_server: str,
    tiny_world: World,
    tokenizer: ChatTokenizer,
    student: ChatTokenizer,
    rollouts: list[Rollout],
) -> None:
    teacher = remote_teacher(
        [score_server],
        tokenizer=tokenizer,
        student=student,
        top_k=None,
        shape="mopd",
        endpoint={"temperature": TAU},
    )
    wanted = near(tiny_world, student, top_k=None).score(rollouts)
    for one, two in zip(teacher.score(rollouts), wanted, strict=True):
        assert one.valid.all() and one.topk_ids is None and two.topk_ids is None
        assert one.topk_logprobs == pytest.approx(two.topk_logprobs, abs=1e-4)
        assert one.lse == pytest.approx(two.lse, abs=1e-4)
        assert np.isneginf(one.log_tail).all()
        assert one.model_fingerprint == two.model_fingerprint
    assert not teacher.missing
    teacher.close()


def test_half_precision_is_off_by_what_the_docs_say(
    score_server: str,
    tiny_world: World,
    tokenizer: ChatTokenizer,
    student: ChatTokenizer,
    rollouts: list[Rollout],
) -> None:
    teacher = remote_teacher(
        [score_server],
        tokenizer=tokenizer,
        student=student,
        top_k=32,
        shape="mopd",
        wire="fp16",
        endpoint={"temperature": TAU},
    )
    wanted = near(tiny_world, student, top_k=32).score(rollouts)
    for one, two in zip(teacher.score(rollouts), wanted, strict=True):
        assert one.valid.all()
        off = np.abs(one.topk_logprobs - two.topk_logprobs)
        assert (off <= np.abs(two.topk_logprobs) * 2**-11 + 1e-4).all()
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)
        assert one.log_tail == pytest.approx(two.log_tail, abs=1e-4)
    assert not teacher.missing
    teacher.close()


def test_a_token_of_mopd_serve(
    engine: TransformersScorer,
    tokenizer: ChatTokenizer,
    student: ChatTokenizer,
    rollouts: list[Rollout],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "0123456789abcdef")
    for url in serve(engine, "0123456789abcdef"):
        with pytest.raises(TeacherError, match=r"401.*api_key_env"):
            remote_teacher([url], tokenizer=tokenizer, student=student, shape="mopd")
        teacher = remote_teacher(
            [url],
            tokenizer=tokenizer,
            student=student,
            shape="mopd",
            endpoint={"api_key_env": "TEACHER_KEY"},
        )
        assert all(scores.valid.all() for scores in teacher.score(rollouts))
        teacher.close()


async def slowly(writer: asyncio.StreamWriter, reply: Any) -> bool:
    await asyncio.sleep(0.5)  # longer than a busy machine's pause: requests are to overlap
    await send_json(writer, reply)
    return True


@pytest.mark.parametrize(
    ("options", "kind"),
    [({"generate": True}, VllmGenerate), ({"generate": False}, VllmCompletions)],
)
def test_the_faster_path_is_taken_where_the_server_has_it(
    options: dict[str, Any],
    kind: type,
    scorer: PrefixScorer,
    tokenizer: ChatTokenizer,
    student: ChatTokenizer,
    rollouts: list[Rollout],
) -> None:
    with StubServer(scorer, StubOptions(**options)) as stub:
        teacher = remote_teacher([stub.url], tokenizer=tokenizer, student=student)
        (endpoint,) = teacher._replicas.endpoints
        assert type(endpoint.protocol) is kind
        teacher.score(rollouts)
        stub.options.fault = lambda number, request: slowly
        began, stub.busiest = len(stub.requests), 0
        teacher.drain_latencies()
        found = teacher.score(rollouts)
        assert all(scores.valid.all() for scores in found)
        asked = stub.requests[began:]
        took = teacher.drain_latencies()
        assert len(took) == len(asked) and min(took) >= 0.5 and not teacher.drain_latencies()
        if kind is VllmGenerate:
            # one for each answer, side by side
            assert len(asked) >= len(rollouts) and stub.busiest >= 2
            assert all(not r["sampling_params"]["detokenize"] for r in asked)
        else:
            assert max(len(request["prompt"]) for request in asked) == len(rollouts)
        teacher.close()


def test_a_server_that_comes_back_without_the_faster_path_is_asked_by_the_other(
    scorer: PrefixScorer,
    tokenizer: ChatTokenizer,
    student: ChatTokenizer,
    rollouts: list[Rollout],
) -> None:
    with StubServer(scorer, StubOptions(generate=True)) as stub:
        teacher = remote_teacher(
            [stub.url],
            tokenizer=tokenizer,
            student=student,
            retry={"restart_budget_s": 20.0},
        )
        clean = teacher.score(rollouts)
        port = stub.port
    with StubServer(scorer, StubOptions(generate=False), port=port):
        again = teacher.score(rollouts)
        for one, two in zip(clean, again, strict=True):
            assert one.topk_logprobs.tobytes() == two.topk_logprobs.tobytes()
        assert isinstance(teacher._replicas.endpoints[0].protocol, VllmCompletions)
    teacher.close()


def test_replicas_of_mopd_serve_are_told_apart_by_fingerprint(
    scorer: PrefixScorer, tokenizer: ChatTokenizer, student: ChatTokenizer
) -> None:
    """Even where a fixed text scores the same."""
    with (
        StubServer(scorer, StubOptions(model="a" * 64)) as one,
        StubServer(scorer, StubOptions(model="b" * 64)) as two,
        pytest.raises(TeacherError, match=r"serves bbbbbbbbbbbb\.\.\. and the first replica aaa"),
    ):
        remote_teacher([one.url, two.url], tokenizer=tokenizer, student=student, shape="mopd")


def test_another_fingerprint_behind_the_same_address_ends_the_run(
    scorer: PrefixScorer,
    tokenizer: ChatTokenizer,
    student: ChatTokenizer,
    rollouts: list[Rollout],
) -> None:
    with StubServer(scorer, StubOptions(model="a" * 64)) as stub:
        teacher = remote_teacher(
            [stub.url],
            tokenizer=tokenizer,
            student=student,
            shape="mopd",
            retry={"restart_budget_s": 20.0},
        )
        assert teacher.score(rollouts)[0].model_fingerprint == "a" * 64
        port = stub.port
    with (
        StubServer(scorer, StubOptions(model="b" * 64), port=port),
        pytest.raises(TeacherError, match=r"served 'aaa.*and now 'bbb"),
    ):
        teacher.score(rollouts)
    teacher.close()


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ("vllm", {"lists_models": False}, r"/v1/models answered 404.*is it a server of this"),
        ("mopd", {"vocab_size": 300}, r"300 columns and the tokenizer 560 tokens"),
        ("mopd", {"max_model_len": 60}, r"reads 59 tokens.*--max-model-len"),
        ("mopd", {"ordered": False}, r"in another order"),
        ("mopd", {"tempered": True}, r"temperature"),
        ("sglang", {"ordered": False}, r"in another order"),
        ("sglang", {"model": "x", "max_model_len": 60}, r"reads 59 tokens"),
        ("trl", {"tempered": True}, r"temperature"),
        ("trl", {"max_logprobs": 4}, r"500.*requested 8 logprobs"),
    ],
)
def test_a_wrong_server_is_refused(
    shape: str,
    options: dict[str, Any],
    message: str,
    scorer: PrefixScorer,
    tokenizer: ChatTokenizer,
    student: ChatTokenizer,
) -> None:
    with (
        StubServer(scorer, StubOptions(**options)) as stub,
        pytest.raises(TeacherError, match=message),
    ):
        remote_teacher(
            [stub.url],
            tokenizer=tokenizer,
            student=student,
            shape=shape,
            endpoint={"start_s": 0.0},
        )


@pytest.mark.parametrize("shape", ["mopd", "trl"])
def test_a_request_holds_no_more_than_its_budget(
    shape: str,
    scorer: PrefixScorer,
    tokenizer: ChatTokenizer,
    student: ChatTokenizer,
) -> None:
    with StubServer(scorer) as stub:
        teacher = remote_teacher(
            [stub.url],
            tokenizer=tokenizer,
            student=student,
            shape=shape,
            retry={"entries_per_request": 100},
        )
        canary = teacher._canary.prompts[0].tolist()  # sent on every new connection
        began = len(stub.requests)
        teacher.score([make_rollout_of(student, b"bo %d" % i) for i in range(8)])
        sizes = []
        for request in stub.requests[began:]:
            if shape == "mopd":
                pairs = [(s["ids"], s["start"]) for s in request["sequences"]]
            else:
                pairs = list(zip(request["sequences"], request["prompt_lengths"], strict=True))
            if pairs != [(canary, 1)]:
                width = 8 if shape == "mopd" else 9
                sizes.append(sum(len(ids) - start for ids, start in pairs) * width)
        assert max(sizes) <= 100 and 1 < len(sizes) < 8
        teacher.close()
