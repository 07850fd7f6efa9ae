"""The endpoint in vLLM's server, on an engine that is made up."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mopd.demo import World
from mopd.serving import vllm_app
from mopd.serving.models import model_fingerprint
from mopd.serving.scoring import MAX_BODY_BYTES, MODEL_PATH, SCORE_PATH, join_rows
from mopd.serving.vllm_app import ScoreMiddleware
from mopd.serving.vllm_command import TOKEN_VARIABLE, server_environment, server_words
from mopd.serving.wire import RawRows, decode, encode_rows

TOKEN = "a-token-of-enough-length"
SEQUENCES = [{"ids": [1, 2, 3], "start": 1}, {"ids": [4], "start": 1}, {"ids": [5, 6], "start": 1}]
BODY = {"request": "r", "sequences": SEQUENCES, "top_k": 2, "temperature": 1.0}
BODY |= {"vocab_size": 9, "wire": "fp32"}


class Engine:
    """Answers as two ranks do; the rows tell the position that they were taken at."""

    def __init__(self, model: Path) -> None:
        config = SimpleNamespace(model=str(model), max_model_len=8)
        parallel = SimpleNamespace(data_parallel_size=1)
        self.vllm_config = SimpleNamespace(model_config=config, parallel_config=parallel)
        self.calls: list[str] = []
        self.dropped: list[str] = []
        self.loses_rows = False
        self.failure: Exception | None = None
        self.running: set[str] = set()
        self.endless = False

    async def run(self, key: str) -> None:
        """Until it is cancelled, which takes the engine a moment."""
        self.running.add(key)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            self.running.discard(key)

    async def collective_rpc(self, method: str, *, timeout: float, args: tuple = ()) -> list[Any]:
        assert timeout
        self.calls.append(method)
        if method == "mopd_install":
            return [9, 9]
        if method == "mopd_drop":
            assert not self.running, "rows would come behind the call that drops them"
            self.dropped += args[0]
            return [None, None]
        spans, wire = args
        rows = [_rows(first, last) for _, first, last in spans]
        return [b"", b"" if self.loses_rows else encode_rows(join_rows(rows), wire=wire)]


def _rows(first: int, last: int) -> RawRows:
    position = np.arange(first, last, dtype=np.float32)
    return RawRows(
        topk_ids=np.zeros((len(position), 2), dtype=np.int32),
        topk_logprobs=np.zeros((len(position), 2), dtype=np.float32),
        logprobs=position,
        log_tail=position,
        lse=np.zeros((len(position), 2), dtype=np.float32),
    )


@pytest.fixture
def engine(tiny_world: World, monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine(tiny_world.teachers["sort"])

    async def prefill(given: Any, request: Any, sequence: Any, *, key: str) -> None:
        assert given is engine and len(sequence.ids) > sequence.start
        if engine.failure and (len(sequence.ids) == 2 or not engine.endless):
            raise engine.failure
        if engine.endless:
            await engine.run(key)

    monkeypatch.setattr(vllm_app, "_prefill", prefill)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    return engine


def call(
    middleware: ScoreMiddleware,
    engine: Engine,
    *,
    path: str = SCORE_PATH,
    method: str = "POST",
    chunks: list[bytes] | None = None,
    token: str | None = None,
    host: str = "127.0.0.1",
    gone: bool = False,
) -> tuple[int, bytes]:
    """One request; its body comes in two parts unless ``chunks`` says otherwise. ``gone``: the
    client leaves while it waits for the answer."""
    text = json.dumps(BODY).encode()
    chunks = [text[:5], text[5:]] if chunks is None else chunks
    pending = [{"body": c, "more_body": i < len(chunks) - 1} for i, c in enumerate(chunks)]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if pending:
            return {"type": "http.request", **pending.pop(0)}
        if not gone:
            await asyncio.Event().wait()
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "path": path,
        "method": method,
        "headers": [(b"authorization", token.encode())] if token else [],
        "server": (host, 80),
        "app": SimpleNamespace(state=SimpleNamespace(engine_client=engine)),
    }
    asyncio.run(asyncio.wait_for(middleware(scope, receive, send), 10.0))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    """vLLM's own application."""
    await send({"type": "http.response.start", "status": 299, "headers": []})


def test_the_rows_of_the_engine_are_sent(engine: Engine) -> None:
    status, data = call(ScoreMiddleware(refuse), engine)
    assert status == 200
    reply = decode(data, max_bytes=1 << 20)
    assert reply.header.rows == (2, 0, 1)
    assert reply.header.model == model_fingerprint(Path(engine.vllm_config.model_config.model))
    assert reply.rows.logprobs.tolist() == [0.0, 1.0, 0.0]
    assert engine.dropped == []


def test_the_engine_is_prepared_once(engine: Engine) -> None:
    middleware = ScoreMiddleware(refuse)
    for _ in range(2):
        status, data = call(middleware, engine, path=MODEL_PATH, method="GET")
        assert status == 200 and json.loads(data)["max_length"] == 7
    assert engine.calls == ["mopd_install"]


def test_other_paths_are_vllms(engine: Engine) -> None:
    assert call(ScoreMiddleware(refuse), engine, path="/v1/completions")[0] == 299
    assert engine.calls == []


@pytest.mark.parametrize("token", [None, TOKEN, "Bearer", f"Bearer {TOKEN}x", "Bearer \u00fc"])
def test_a_wrong_token_is_refused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    middleware = ScoreMiddleware(refuse)
    for path in (SCORE_PATH, MODEL_PATH, "/v1/models", "/tokenize", "/scale_elastic_ep"):
        for method in ("GET", "POST"):
            assert call(middleware, engine, path=path, method=method, token=token)[0] == 401
    assert engine.calls == []
    assert call(middleware, engine, path="/health", token=token)[0] == 299
    good = f"Bearer {TOKEN}"
    assert call(middleware, engine, path="/tokenize", token=good)[0] == 299
    assert call(middleware, engine, token=f"Bearer {TOKEN}", host="10.0.0.1")[0] == 200


def test_a_websocket_needs_the_token_too(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    asyncio.run(ScoreMiddleware(refuse)(scope, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize("host", ["10.0.0.1", "0.0.0.0", "", "example.org"])
def test_an_open_address_without_a_token_is_refused(engine: Engine, host: str) -> None:
    middleware = ScoreMiddleware(refuse)
    for path in (SCORE_PATH, MODEL_PATH, "/v1/models", "/tokenize", "/metrics", "/"):
        status, said = call(middleware, engine, host=host, path=path)
        assert status == 401 and TOKEN_VARIABLE.encode() in said
    assert call(middleware, engine, host=host, path="/health")[0] == 299


def test_a_wrong_body_is_refused(engine: Engine) -> None:
    assert call(ScoreMiddleware(refuse), engine, chunks=[b"{}"])[0] == 400
    endless = [b"x" * (MAX_BODY_BYTES // 2)] * 3
    assert call(ScoreMiddleware(refuse), engine, chunks=endless)[0] == 413
    assert call(ScoreMiddleware(refuse), engine, method="GET")[0] == 405


def test_lost_rows_and_a_failing_engine_leave_nothing_behind(engine: Engine) -> None:
    engine.loses_rows = True
    assert call(ScoreMiddleware(refuse), engine)[0] == 503
    assert len(engine.dropped) == 2  # the sequence without rows was never sent
    engine.failure = RuntimeError("the engine is dead")
    with pytest.raises(RuntimeError, match="dead"):
        call(ScoreMiddleware(refuse), engine)
    assert len(engine.dropped) == 4
    engine.endless = True  # the other request still runs
    with pytest.raises(RuntimeError, match="dead"):
        call(ScoreMiddleware(refuse), engine)
    assert len(engine.dropped) == 6 and not engine.running


def test_nothing_is_computed_for_a_client_that_went_away(engine: Engine) -> None:
    engine.endless = True
    status, body = call(ScoreMiddleware(refuse), engine, gone=True)
    assert status == 400 and b"went away" in body  # nobody reads it
    assert len(engine.dropped) == 2 and not engine.running


def test_several_engines_behind_one_server_are_refused(engine: Engine) -> None:
    """Their rows would come back from the first one alone."""
    engine.vllm_config.parallel_config.data_parallel_size = 2
    for path, method in ((MODEL_PATH, "GET"), (SCORE_PATH, "POST")):
        status, body = call(ScoreMiddleware(refuse), engine, path=path, method=method)
        assert status == 400 and b"data_parallel_size is 2" in body and b"urls" in body
    assert engine.calls == []


def test_the_start_command() -> None:
    words = server_words(Path("m"), host="h", port=1, more=["--x"], scoring=True)
    assert words[-1] == "--x" and "mopd.serving.vllm_app.ScoreMiddleware" in words
    assert "--middleware" not in server_words(Path("m"), host="h", port=1, scoring=False)
    assert server_environment({}, token=None).get("VLLM_API_KEY") is None
    environment = server_environment({"A": "b"}, token=TOKEN)
    assert environment["A"] == "b"
    assert environment[TOKEN_VARIABLE] == environment["VLLM_API_KEY"] == TOKEN
    assert not any(TOKEN in word for word in words)


def test_the_start_command_of_a_server_that_samples() -> None:
    words = server_words(Path("m"), host="h", port=1, more=["--x"], scoring=True, sampling=True)
    assert words[-1] == "--x" and words.count("--middleware") == 1
    assert "mopd.serving.vllm_sampling.SampleMiddleware" in words
    assert "mopd.serving.vllm_weights.WeightsExtension" in words
    assert words[words.index("--logprobs-mode") + 1] == "processed_logprobs"
