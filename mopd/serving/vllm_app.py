"""The scoring endpoint inside vLLM's own HTTP server: an ASGI middleware and a start command.

`--middleware mopd.serving.vllm_app.ScoreMiddleware` answers the two paths of `serving.scoring` and
passes everything else on. It is vLLM's outermost layer, so it checks the token by itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from mopd.serving.address import is_loopback
from mopd.serving.models import model_fingerprint
from mopd.serving.scoring import (
    MAX_BODY_BYTES,
    MODEL_PATH,
    SCORE_PATH,
    RequestError,
    ScoredSequence,
    ScoreLimits,
    ScoreRequest,
    is_authorised,
    read_request,
)
from mopd.serving.vllm_command import TOKEN_VARIABLE
from mopd.serving.vllm_turns import EngineTurns
from mopd.serving.vllm_worker import EXTRA_ARG
from mopd.serving.wire import CONTENT_TYPE, encode_header

RPC_SECONDS = 60.0

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class ScoreMiddleware:
    """One per server. The engine is found on the first request, when it is ready."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._token = os.environ.get(TOKEN_VARIABLE)
        self._ready: asyncio.Task[tuple[str, ScoreLimits]] | None = None
        self._devices = EngineTurns()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answers its own paths, and keeps strangers off vLLM's other paths too."""
        self._devices.attend(scope)
        own = scope["type"] == "http" and scope["path"] in (SCORE_PATH, MODEL_PATH)
        if not own:
            if (refusal := self._refusal(scope)) is not None:
                await _refuse(scope, send, refusal)
            else:
                await self._pass_on(scope, receive, send)
            return
        try:
            self._admit(scope)
            engine = scope["app"].state.engine_client
            fingerprint, limits = await self._engine(engine)
            if scope["path"] == MODEL_PATH:
                known = {"model": fingerprint, "vocab_size": limits.vocab_size}
                body = json.dumps(known | {"max_length": limits.max_length}).encode()
                await send_answer(send, 200, "application/json", [body])
                return
            request = read_request(await read_body(receive), limits=limits)
            async with self._devices.turn(scope):
                rows = await while_connected(receive, _score(engine, request))
            header = encode_header(request.header(model=fingerprint))
            await send_answer(send, 200, CONTENT_TYPE, [header, rows])
        except RequestError as error:
            await send_error(send, error)

    async def _pass_on(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        try:
            async with self._devices.turn(scope):
                await self._app(scope, receive, send)
        except RequestError as error:  # vLLM raises none: no turn, and no answer has begun
            if scope["type"] == "http":
                await send_error(send, error)
            else:
                await send({"type": "websocket.close", "code": 1013})

    def _refusal(self, scope: dict[str, Any]) -> RequestError | None:
        """vLLM's own key guards some prefixes only; /health stays open for who watches.

        On the loopback a server may do without a token, elsewhere nobody is let in without one.
        """
        if scope["type"] not in ("http", "websocket") or scope["path"] == "/health":
            return None
        local = scope.get("server") or ("", 0)
        if self._token is None and not is_loopback(local[0]):
            return RequestError(f"this address needs a token: set {TOKEN_VARIABLE}", status=401)
        given = dict(scope["headers"]).get(b"authorization", b"")
        if is_authorised(given.decode("utf-8", "surrogateescape"), token=self._token):
            return None
        return RequestError("a wrong token, or none", status=401)

    def _admit(self, scope: dict[str, Any], *, methods: tuple[str, ...] = ()) -> None:
        if (refusal := self._refusal(scope)) is not None:
            raise refusal
        if scope["method"] not in (methods or ("POST" if scope["path"] == SCORE_PATH else "GET",)):
            raise RequestError("another method", status=405)

    async def _engine(self, engine: Any) -> tuple[str, ScoreLimits]:
        """Hooks the workers and hashes the model, once; a failure is tried again."""
        if self._ready is None or (self._ready.done() and self._ready.exception()):
            self._ready = asyncio.create_task(_prepare(engine))
        return await asyncio.shield(self._ready)


async def _prepare(engine: Any) -> tuple[str, ScoreLimits]:
    if (engines := engine.vllm_config.parallel_config.data_parallel_size) > 1:
        raise RequestError(
            f"data_parallel_size is {engines}, and rows come back from the first engine alone: "
            "start one server for each, and name all of them in backend.urls"
        )
    widths = await engine.collective_rpc("mopd_install", timeout=RPC_SECONDS)
    config = engine.vllm_config.model_config
    fingerprint = await asyncio.to_thread(model_fingerprint, Path(config.model))
    # one token is sampled behind the sequence, and must fit too
    limits = ScoreLimits(vocab_size=min(widths), max_length=config.max_model_len - 1)
    return fingerprint, limits


async def _score(engine: Any, request: ScoreRequest) -> bytes:
    """The arrays of the answer; every sequence is a request of its own to the engine."""
    spans: list[tuple[str, int, int]] = []
    tasks = []
    for sequence in request.sequences:
        if sequence.start < len(sequence.ids):
            key = uuid.uuid4().hex
            spans.append((key, sequence.start - 1, len(sequence.ids) - 1))
            tasks.append(asyncio.create_task(_prefill(engine, request, sequence, key=key)))
    if not spans:
        return b""
    keys = [key for key, _, _ in spans]
    try:
        await asyncio.gather(*tasks)
        answers = await engine.collective_rpc(
            "mopd_take", timeout=RPC_SECONDS, args=(spans, request.wire)
        )
        expected = request.header(model="").body_bytes()
        for rows in answers:
            if len(rows) == expected:
                return rows
        raise RequestError("the engine lost rows; send the request again", status=503)
    except BaseException:
        for task in tasks:
            task.cancel()
        # a request that still runs would put rows behind the call that drops them
        await asyncio.gather(*tasks, return_exceptions=True)
        await engine.collective_rpc("mopd_drop", timeout=RPC_SECONDS, args=(keys,))
        raise


async def _prefill(
    engine: Any, request: ScoreRequest, sequence: ScoredSequence, *, key: str
) -> None:
    """One pass over one sequence. A cached prefix has no hidden states, so none is read."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]: not in every venv
    from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

    wanted = {
        "key": key,
        "start": sequence.start,
        "top_k": request.top_k,
        "temperature": request.temperature,
        "vocab_size": request.vocab_size,
    }
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        detokenize=False,
        skip_reading_prefix_cache=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={EXTRA_ARG: wanted},
    )
    prompt = {"prompt_token_ids": sequence.ids.tolist()}
    async for _ in engine.generate(prompt, params, request_id=f"mopd-{key}"):
        pass


async def _refuse(scope: dict[str, Any], send: Send, refusal: RequestError) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await send_error(send, refusal)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, bytes]) -> bytes:
    """The result of ``work``, which is cancelled when the client goes away.

    Raises:
        RequestError: it went away.
    """
    gone = asyncio.create_task(_disconnected(receive))
    working = asyncio.create_task(work)
    try:
        await asyncio.wait((gone, working), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise RequestError("the client went away")
    finally:
        for task in (gone, working):
            task.cancel()
        await asyncio.gather(gone, working, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(receive: Receive) -> bytes:
    """The whole body, up to `MAX_BODY_BYTES`."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError("the client went away")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            raise RequestError(f"a body over {MAX_BODY_BYTES} bytes", status=413)
        if not message.get("more_body", False):
            return b"".join(parts)


async def send_error(send: Send, error: RequestError) -> None:
    """The error as JSON."""
    body = json.dumps({"error": {"message": error.message}}).encode()
    await send_answer(send, error.status, "application/json", [body])


async def send_answer(send: Send, status: int, content_type: str, parts: list[bytes]) -> None:
    """A whole answer, in parts."""
    size = sum(map(len, parts))
    headers = [
        (b"content-type", content_type.encode()),
        (b"content-length", str(size).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    for part in parts:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
