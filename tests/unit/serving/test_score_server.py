"""`mopd serve` around transformers: the teacher's own rows, and a closed door."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from mopd.demo import World
from mopd.errors import ConfigError
from mopd.serving.hf_scorer import TransformersScorer
from mopd.serving.models import load_causal_lm, model_fingerprint
from mopd.serving.rows import rows_of_logits
from mopd.serving.score_server import ScoreServer
from mopd.serving.scoring import MAX_BODY_BYTES, MODEL_PATH, SCORE_PATH, Scorer, ScoreRequest
from mopd.serving.wire import RawRows, decode

TOKEN = "a-token-of-enough-length"
IDS = [[5, 6, 7, 8, 9, 10, 11], [9, 8, 7], [20, 21, 22, 23]]
STARTS = [3, 1, 4]


@pytest.fixture(scope="module")
def scorer(tiny_world: World) -> TransformersScorer:
    return TransformersScorer(tiny_world.teachers["sort"], device=torch.device("cpu"))


@contextmanager
def serving(scorer: Scorer, *, token: str | None = None) -> Iterator[ScoreServer]:
    with ScoreServer("127.0.0.1", 0, scorer=scorer, token=token) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def call(
    server: ScoreServer, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)  # type: ignore[arg-type]
    try:
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def body(scorer: Scorer, **changes: Any) -> bytes:
    sequences = [{"ids": ids, "start": start} for ids, start in zip(IDS, STARTS, strict=True)]
    wanted = {"request": "r", "sequences": sequences, "top_k": 5, "temperature": 2.0}
    wanted |= {"vocab_size": scorer.limits.vocab_size - 9, "wire": "fp32"}
    return json.dumps(wanted | changes).encode()


@pytest.mark.parametrize("top_k", [5, None])
def test_rows_are_those_of_a_plain_forward_pass(
    tiny_world: World, scorer: TransformersScorer, top_k: int | None
) -> None:
    with serving(scorer) as server:
        status, data = call(server, "POST", SCORE_PATH, body(scorer, top_k=top_k))
    assert status == 200
    reply = decode(data, max_bytes=1 << 20)
    path = tiny_world.teachers["sort"]
    assert reply.header.model == model_fingerprint(path)
    assert reply.header.rows == (4, 2, 0)
    model = load_causal_lm(path, device=torch.device("cpu"))
    for part, ids, start in zip(reply.per_sequence(), IDS, STARTS, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        exact = rows_of_logits(
            logits[:, : scorer.limits.vocab_size - 9],
            torch.tensor(ids[start:]),
            top_k=top_k,
            temperature=2.0,
        )
        for name in ("topk_logprobs", "logprobs", "log_tail", "lse"):
            np.testing.assert_allclose(getattr(part, name), getattr(exact, name), atol=1e-5)


def test_small_batches_change_nothing(
    scorer: TransformersScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(scorer) as server:
        _, whole = call(server, "POST", SCORE_PATH, body(scorer))
        monkeypatch.setattr("mopd.serving.hf_scorer.BLOCK_ELEMENTS", 1)
        _, parts = call(server, "POST", SCORE_PATH, body(scorer))
    left, right = (decode(data, max_bytes=1 << 20).rows for data in (whole, parts))
    np.testing.assert_allclose(left.topk_logprobs, right.topk_logprobs, atol=1e-5)


def test_the_door(scorer: TransformersScorer) -> None:
    with serving(scorer, token=TOKEN) as server:
        for headers in ({}, {"Authorization": TOKEN}, {"Authorization": f"Bearer {TOKEN}x"}):
            for method, path in (("POST", SCORE_PATH), ("GET", MODEL_PATH), ("GET", "/nothing")):
                assert call(server, method, path, body(scorer), **headers)[0] == 401
        good = {"Authorization": f"Bearer {TOKEN}"}
        assert call(server, "POST", SCORE_PATH, body(scorer), **good)[0] == 200
        assert json.loads(call(server, "GET", MODEL_PATH, **good)[1]) == {
            "model": scorer.fingerprint,
            "vocab_size": scorer.limits.vocab_size,
            "max_length": scorer.limits.max_length,
        }
    with pytest.raises(ConfigError, match="not loopback"):
        ScoreServer("0.0.0.0", 0, scorer=scorer, token=None)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", SCORE_PATH, {}, 405),
        ("POST", MODEL_PATH, {}, 405),
        ("POST", "/v1/completions", {}, 400),
        ("GET", "/v1/completions", {}, 405),
        ("POST", "/v1/models", {}, 404),
        ("POST", SCORE_PATH, {"Content-Length": "-1"}, 411),
        ("POST", SCORE_PATH, {"Content-Length": "1" * 400}, 411),
        ("POST", SCORE_PATH, {"Content-Length": str(MAX_BODY_BYTES + 1)}, 413),
        ("POST", SCORE_PATH, {"Content-Length": "2"}, 400),
    ],
)
def test_a_wrong_call_is_refused(
    scorer: TransformersScorer, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    with serving(scorer) as server:
        answered, data = call(server, method, path, b"{}", **headers)
        assert (answered, "error" in json.loads(data)) == (status, True)
        assert call(server, "POST", SCORE_PATH, body(scorer))[0] == 200


def test_a_client_that_says_nothing_holds_nobody_up(scorer: TransformersScorer) -> None:
    with serving(scorer) as server:
        silent = socket.create_connection(server.server_address[:2])  # type: ignore[arg-type]
        try:
            assert call(server, "POST", SCORE_PATH, body(scorer))[0] == 200
        finally:
            silent.close()


def test_many_clients_may_come_at_once(scorer: TransformersScorer) -> None:
    """Before the server takes the first of them."""
    with ExitStack() as opened:
        server = ScoreServer("127.0.0.1", 0, scorer=scorer, token=None)
        opened.callback(server.server_close)
        for _ in range(64):
            one = socket.create_connection(server.server_address[:2], timeout=20.0)  # type: ignore[arg-type]
            opened.callback(one.close)


def test_a_failing_engine_is_a_500_and_tells_nothing(
    scorer: TransformersScorer, capfd: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        fingerprint = scorer.fingerprint
        limits = scorer.limits

        def score(self, request: ScoreRequest) -> RawRows:
            raise RuntimeError("a path nobody should read")

    with serving(Broken()) as server:
        status, data = call(server, "POST", SCORE_PATH, body(scorer))
    assert status == 500 and b"path" not in data
    assert "a path nobody should read" in capfd.readouterr().err
