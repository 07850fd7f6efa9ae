"""What mopd relies on in a stock vLLM server: its numbers, its shapes, its refusals."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from mopd.demo import World
from mopd.rollout.base import make_rollout
from mopd.serving.generation import Generated
from mopd.teachers.base import teacher_input
from mopd.teachers.hf import HfOptions, HfTeacher
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, TeacherScores
from tests.helpers.vllm_server import MAX_LOGPROBS, MAX_MODEL_LEN, MODEL_NAME, VllmServer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TOP_K = 8
TOLERANCE = 1e-4
RESPONSES = [b"12 7 390", b"bo 12 ka", "\u00fc \u20ac".encode(), b"bo", b""]


@pytest.fixture(scope="module")
def scored(tiny_world: World) -> list[tuple[list[int], TeacherScores]]:
    """Prompt ids and the scores of the `hf` backend for a few answers."""
    student = ChatTokenizer.load(tiny_world.student)
    path = tiny_world.teachers["sort"]
    teacher = HfTeacher(
        "sort",
        path,
        tokenizer=ChatTokenizer.load(path),
        student=student,
        device=torch.device("cpu"),
        options=HfOptions(top_k=TOP_K, temperature=2.0, batch_size=4),
    )
    rollouts = []
    for number, response in enumerate(RESPONSES):
        ids = [*student.vocabulary.encode(response), student.eos_id]
        prompt = Prompt(
            id=str(number), messages=({"role": "user", "content": "bo 12 ka"},), domain="sort"
        )
        answer = Generated(
            token_ids=np.array(ids, dtype=np.int32),
            logprobs=np.zeros(len(ids), dtype=np.float32),
            stopped=True,
        )
        rollouts.append(
            make_rollout(
                prompt,
                sample_index=0,
                prompt_ids=student.prompt_ids(prompt.messages),
                generated=answer,
                tokenizer=student,
                version=0,
            )
        )
    prompts = [
        teacher_input(rollout, teacher.tokenizer, student=student).prompt_ids.tolist()
        for rollout in rollouts
    ]
    return list(zip(prompts, teacher.score(rollouts), strict=True))


def prompt_logprobs(server: VllmServer, endpoint: str, ids: list[int], **params: Any) -> list[Any]:
    if endpoint == "/v1/completions":
        body = {"model": MODEL_NAME, "prompt": [ids], "max_tokens": 1} | params
    else:
        sampling = {"max_tokens": 1, "detokenize": False} | params
        body = {"model": MODEL_NAME, "token_ids": ids, "sampling_params": sampling}
    status, reply = server.request(endpoint, body)
    assert status == 200, reply
    answer = json.loads(reply)
    return (answer["choices"][0] if endpoint == "/v1/completions" else answer)["prompt_logprobs"]


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/inference/v1/generate"])
def test_prompt_logprobs_are_those_of_transformers(
    vllm_server: VllmServer, scored: list[tuple[list[int], TeacherScores]], endpoint: str
) -> None:
    for prompt_ids, scores in scored:
        ids = [*prompt_ids, *scores.token_ids.tolist()]
        positions = prompt_logprobs(vllm_server, endpoint, ids, prompt_logprobs=TOP_K)
        assert len(positions) == len(ids) and positions[0] is None
        assert scores.topk_ids is not None
        for row, entries in enumerate(positions[len(prompt_ids) :]):
            found = {int(key): entry["logprob"] for key, entry in entries.items()}
            actual = int(scores.token_ids[row])
            assert found[actual] == pytest.approx(scores.logprobs[row], abs=TOLERANCE)
            by_rank = sorted(entries.values(), key=lambda entry: entry["rank"])[:TOP_K]
            np.testing.assert_allclose(
                [entry["logprob"] for entry in by_rank], scores.topk_logprobs[row], atol=TOLERANCE
            )
            # two tokens closer than rounding may change places, so ids are compared by value
            for token, logprob in zip(
                scores.topk_ids[row].tolist(), scores.topk_logprobs[row], strict=True
            ):
                if token in found:
                    assert found[token] == pytest.approx(logprob, abs=TOLERANCE)
                else:
                    assert logprob == pytest.approx(scores.topk_logprobs[row][-1], abs=TOLERANCE)


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/inference/v1/generate"])
def test_a_position_has_k_entries_and_the_actual_token(
    vllm_server: VllmServer, endpoint: str
) -> None:
    ids = list(range(5, 45))
    positions = prompt_logprobs(vllm_server, endpoint, ids, prompt_logprobs=3)
    for token, entries in zip(ids[1:], positions[1:], strict=True):
        assert str(token) in entries and len(entries) in (3, 4)
        assert {"logprob", "rank", "decoded_token"} <= entries[str(token)].keys()
        decoded = {type(entry["decoded_token"]) for entry in entries.values()}
        assert decoded == {str if endpoint == "/v1/completions" else type(None)}


def test_temperature_does_not_apply_to_prompts(vllm_server: VllmServer) -> None:
    ids = list(range(5, 25))
    cold, hot = (
        prompt_logprobs(
            vllm_server, "/inference/v1/generate", ids, prompt_logprobs=2, temperature=temperature
        )
        for temperature in (0.5, 2.0)
    )
    for left, right in zip(cold[1:], hot[1:], strict=True):
        assert left.keys() == right.keys()
        for key in left:
            assert left[key]["logprob"] == pytest.approx(right[key]["logprob"], abs=TOLERANCE)


def test_echo_scores_without_sampling_but_by_string(vllm_server: VllmServer) -> None:
    body = {"model": MODEL_NAME, "prompt": [[5, 6, 7]], "max_tokens": 0, "echo": True}
    status, reply = vllm_server.request("/v1/completions", body | {"logprobs": 3})
    assert status == 200
    logprobs = json.loads(reply)["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == 3 and logprobs["token_logprobs"][0] is None
    assert all(isinstance(key, str) for key in logprobs["top_logprobs"][1])


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"max_tokens": 0}, 400),
        ({"prompt_logprobs": MAX_LOGPROBS + 1}, 400),
        ({"prompt": [[5] * MAX_MODEL_LEN]}, 400),
        ({"prompt": [[5] * (MAX_MODEL_LEN - 1)]}, 200),
        ({"prompt": [[5, 100_000]]}, 400),
        ({"model": "another"}, 404),
    ],
)
def test_limits(vllm_server: VllmServer, change: dict[str, Any], status: int) -> None:
    body = {"model": MODEL_NAME, "prompt": [[5, 6]], "max_tokens": 1, "prompt_logprobs": 1}
    assert vllm_server.request("/v1/completions", body | change)[0] == status


def test_the_server_names_its_model(vllm_server: VllmServer) -> None:
    status, reply = vllm_server.request("/v1/models")
    assert status == 200
    (model,) = json.loads(reply)["data"]
    assert model["id"] == MODEL_NAME and model["max_model_len"] == MAX_MODEL_LEN
