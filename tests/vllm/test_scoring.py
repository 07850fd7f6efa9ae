"""mopd's endpoint inside a real vLLM server: the rows of a transformers forward pass."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from mopd.serving.hf_scorer import TransformersScorer
from mopd.serving.models import model_fingerprint
from mopd.serving.scoring import MODEL_PATH, SCORE_PATH, ScoreRequest, read_request
from mopd.serving.wire import RawRows, decode
from tests.helpers.vllm_server import MAX_LOGPROBS, MAX_MODEL_LEN, MODEL_NAME, VllmServer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TOLERANCE = 1e-4
MAX_BYTES = 1 << 30


@pytest.fixture(scope="module")
def scorer(vllm_server: VllmServer) -> TransformersScorer:
    return TransformersScorer(vllm_server.model_dir, device=torch.device("cpu"))


def body(scorer: TransformersScorer, lengths: list[int], **changes: Any) -> dict[str, Any]:
    """Random sequences of ``lengths``, from the second token on."""
    random = np.random.default_rng(sum(lengths))
    size = scorer.limits.vocab_size
    sequences = [
        {"ids": random.integers(0, size, length).tolist(), "start": 1} for length in lengths
    ]
    wanted = {"request": "r-1", "sequences": sequences, "top_k": 16, "temperature": 2.0}
    return wanted | {"vocab_size": size, "wire": "fp32"} | changes


def ask(server: VllmServer, wanted: dict[str, Any]) -> tuple[int, bytes]:
    return server.request(SCORE_PATH, wanted)


def parsed(scorer: TransformersScorer, wanted: dict[str, Any]) -> ScoreRequest:
    return read_request(json.dumps(wanted).encode(), limits=scorer.limits)


def check_rows(found: RawRows, wanted: RawRows, *, atol: float = TOLERANCE) -> None:
    for name in ("logprobs", "log_tail", "lse"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(wanted, name), rtol=0, atol=TOLERANCE, err_msg=name
        )
    np.testing.assert_allclose(found.topk_logprobs, wanted.topk_logprobs, rtol=0, atol=atol)
    if wanted.topk_ids is None:
        assert found.topk_ids is None
        return
    # tokens closer than rounding may change places
    assert found.topk_ids is not None
    assert (found.topk_ids == wanted.topk_ids).mean() > 0.99


@pytest.mark.parametrize("top_k", [1, 16, MAX_LOGPROBS, None])
def test_rows_are_those_of_transformers(
    vllm_server: VllmServer, scorer: TransformersScorer, top_k: int | None
) -> None:
    wanted = body(scorer, [2, 17, 64, 100], top_k=top_k)
    for sequence, start in zip(wanted["sequences"], [1, 9, 64, 50], strict=True):
        sequence["start"] = start  # the third has no row at all
    status, reply = ask(vllm_server, wanted)
    assert status == 200, reply
    answer = decode(reply, max_bytes=MAX_BYTES)
    assert answer.header.rows == (1, 8, 0, 50)
    assert answer.header.request == "r-1"
    assert answer.header.model == model_fingerprint(vllm_server.model_dir)
    check_rows(answer.rows, scorer.score(parsed(scorer, wanted)))


def test_prefill_in_chunks_and_the_longest_sequence(
    vllm_server: VllmServer, scorer: TransformersScorer
) -> None:
    # more than a step of the engine holds, so some sequence is cut
    wanted = body(scorer, [MAX_MODEL_LEN - 1] * 20 + [MAX_MODEL_LEN - 60] * 3)
    status, reply = ask(vllm_server, wanted)
    assert status == 200, reply
    rows = decode(reply, max_bytes=MAX_BYTES).rows
    check_rows(rows, scorer.score(parsed(scorer, wanted)))


def test_a_cached_prefix_changes_nothing(
    vllm_server: VllmServer, scorer: TransformersScorer
) -> None:
    wanted = body(scorer, [200])
    first, second = ask(vllm_server, wanted)[1], ask(vllm_server, wanted)[1]
    check_rows(decode(second, max_bytes=MAX_BYTES).rows, decode(first, max_bytes=MAX_BYTES).rows)


def test_requests_of_all_kinds_at_once(vllm_server: VllmServer, scorer: TransformersScorer) -> None:
    kinds = [
        body(scorer, [30 + number] * 3, top_k=top_k, temperature=temperature, request=str(number))
        for number, (top_k, temperature) in enumerate(
            [(4, 1.0), (16, 2.0), (None, 2.0), (4, 0.5), (16, 2.0), (1, 1.0)]
        )
    ]
    stock = {"model": MODEL_NAME, "prompt": [[5] * 40], "max_tokens": 4, "prompt_logprobs": 2}
    with ThreadPoolExecutor(8) as pool:
        plain = pool.submit(vllm_server.request, "/v1/completions", stock)
        replies = list(pool.map(lambda wanted: ask(vllm_server, wanted), kinds))
    assert plain.result()[0] == 200
    for number, (wanted, (status, reply)) in enumerate(zip(kinds, replies, strict=True)):
        assert status == 200, reply
        answer = decode(reply, max_bytes=MAX_BYTES)
        assert answer.header.request == str(number)
        check_rows(answer.rows, scorer.score(parsed(scorer, wanted)))


def test_half_precision_is_as_exact_as_documented(
    vllm_server: VllmServer, scorer: TransformersScorer
) -> None:
    wanted = body(scorer, [100], wire="fp16", top_k=64)
    found = decode(ask(vllm_server, wanted)[1], max_bytes=MAX_BYTES).rows
    exact = scorer.score(parsed(scorer, wanted))
    check_rows(found, exact, atol=float(-exact.topk_logprobs.min()) * 2**-11 + TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "wanted_status"),
    [
        ({"top_k": 0}, 400),
        ({"temperature": 0}, 400),
        ({"vocab_size": 1 << 20}, 400),
        ({"sequences": [{"ids": [5] * MAX_MODEL_LEN, "start": 1}]}, 400),
        ({"sequences": [{"ids": [5, 100_000], "start": 1}]}, 400),
        ({"sequences": [{"ids": [5, 6], "start": 2}]}, 200),
    ],
)
def test_a_wrong_request_is_refused_and_the_engine_lives(
    vllm_server: VllmServer,
    scorer: TransformersScorer,
    changes: dict[str, Any],
    wanted_status: int,
) -> None:
    assert ask(vllm_server, body(scorer, [10]) | changes)[0] == wanted_status
    assert ask(vllm_server, body(scorer, [10]))[0] == 200


def test_methods_and_the_model(vllm_server: VllmServer, scorer: TransformersScorer) -> None:
    assert vllm_server.request(SCORE_PATH)[0] == 405
    status, reply = vllm_server.request(MODEL_PATH)
    assert status == 200
    known = json.loads(reply)
    assert known["model"] == scorer.fingerprint
    assert known["vocab_size"] == scorer.limits.vocab_size
    assert known["max_length"] == MAX_MODEL_LEN - 1


def test_a_row_has_at_most_540_bytes(vllm_server: VllmServer, scorer: TransformersScorer) -> None:
    wanted = body(scorer, [MAX_MODEL_LEN - 1] * 8, top_k=MAX_LOGPROBS)
    status, rows = ask(vllm_server, wanted)
    assert status == 200
    assert len(rows) <= 540 * sum(decode(rows, max_bytes=MAX_BYTES).header.rows)
