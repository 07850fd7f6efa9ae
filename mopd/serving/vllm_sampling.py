"""Sampling and weight updates inside vLLM's own HTTP server, beside the scoring endpoint.

`--middleware mopd.serving.vllm_sampling.SampleMiddleware` adds the paths of `serving.sampling` to
those of `ScoreMiddleware`. The state of the weights lives here, in the one process that serves
HTTP, and every answer is checked against it before and after the engine has worked.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mopd.serving.channel import Spec
from mopd.serving.sampling import (
    LOGPROBS_PATH,
    METHODS,
    SAMPLE_PATH,
    EngineFacts,
    Sampled,
    SampleOptions,
    SampleTask,
    Update,
    encode_answer,
    read_ids,
    read_object,
    read_sample_request,
    read_update,
)
from mopd.serving.scoring import RequestError
from mopd.serving.versions import ServedVersion
from mopd.serving.vllm_app import (
    RPC_SECONDS,
    Receive,
    ScoreMiddleware,
    Send,
    read_body,
    send_answer,
    send_error,
    while_connected,
)
from mopd.serving.vllm_engine import (
    EXTENSION,
    logprobs_of,
    sampled_of,
    sampling_params,
    scoring_params,
)
from mopd.serving.weight_files import (
    WeightsFileError,
    check_shapes,
    model_specs,
    shapes_of,
    verify_weights,
)

T = TypeVar("T")

JSON = "application/json"
LATE_S = 5.0  # of an answer of the workers, beyond their own deadline


class SampleMiddleware(ScoreMiddleware):
    """One per server, which must have one HTTP process (`--api-server-count 1`)."""

    def __init__(self, app: Any) -> None:
        super().__init__(app)
        self._sampler: EngineSampler | None = None

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answers its own paths and leaves the others to the scoring endpoint and to vLLM."""
        if scope["type"] != "http" or scope["path"] not in METHODS:
            await super().__call__(scope, receive, send)
            return
        self._devices.attend(scope)
        try:
            self._admit(scope, methods=METHODS[scope["path"]])
            sampler = await self._engine_sampler(scope["app"].state.engine_client)
            asked = await read_body(receive)
            # an update that was begun is better ended
            ends = scope["path"] in (SAMPLE_PATH, LOGPROBS_PATH)
            async with self._devices.turn(scope):
                work = sampler.answer(scope["path"], scope["method"], asked)
                body = await (while_connected(receive, work) if ends else work)
            await send_answer(send, 200, JSON, [body])
        except RequestError as error:
            await send_error(send, error)

    async def _engine_sampler(self, engine: Any) -> EngineSampler:
        if self._sampler is None:
            facts = await _facts(engine)
            # another request may have been faster, and its versions must not be lost
            self._sampler = self._sampler or EngineSampler(engine, facts)
        return self._sampler


async def _facts(engine: Any) -> EngineFacts:
    config = engine.vllm_config
    parallel = config.parallel_config
    if getattr(parallel, "_api_process_count", 1) > 1:
        raise RequestError(
            "several HTTP processes would not know of each other's weights: start the server with "
            "--api-server-count 1",
            status=501,
        )
    try:
        devices = await engine.collective_rpc("mopd_device", timeout=RPC_SECONDS)
    except Exception as error:  # vLLM has no type of its own for it
        if "mopd_device" not in str(error):
            raise
        raise RequestError(
            f"the workers have no mopd_device: start the server with --worker-extension-cls "
            f"{EXTENSION}",
            status=501,
        ) from error
    name = config.model_config.served_model_name
    return EngineFacts(
        version=None,
        served_model=name if isinstance(name, str) else name[0],
        vocab_size=config.model_config.get_vocab_size(),
        max_length=config.model_config.max_model_len,
        logprobs_mode=config.model_config.logprobs_mode,
        workers=len(devices),
        device=devices[0],
    )


class EngineSampler:
    """vLLM's asynchronous engine with versioned weights."""

    def __init__(self, engine: Any, facts: EngineFacts) -> None:
        self._engine = engine
        self._facts = facts
        self._served = ServedVersion()
        self._updating = asyncio.Lock()
        self._known: list[Spec] | None = None
        self._numbers = 0

    async def answer(self, path: str, method: str, body: bytes) -> bytes:
        """The body of a 200 answer.

        Raises:
            RequestError: with HTTP's status.
        """
        if path == LOGPROBS_PATH:
            return await self._logprobs(body)
        if path == SAMPLE_PATH:
            return await self._sample(body)
        if method == "POST":
            await self._update(read_update(body, columns=self._facts.vocab_size))
        facts = asdict(self._facts) | {"version": self._served.current}
        return json.dumps(facts).encode()

    async def _sample(self, body: bytes) -> bytes:
        request = read_sample_request(
            body, columns=self._facts.vocab_size, max_length=self._facts.max_length
        )
        ticket = self._served.ticket()
        if ticket.version != request.version:
            return encode_answer(None if self._updating.locked() else ticket.version, [])
        tasks = [asyncio.create_task(self._one(t, request.options)) for t in request.tasks]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)  # each aborts its request to the engine
        return encode_answer(self._served.stamp(ticket), answers)

    async def _one(self, task: SampleTask, options: SampleOptions) -> Sampled:
        params = sampling_params(task, options)
        return sampled_of(await self._last(list(task.ids), params), options)

    async def _logprobs(self, body: bytes) -> bytes:
        fields = read_object(body, {"ids"})
        ids = read_ids(
            fields["ids"],
            "ids",
            longest=self._facts.max_length - 1,
            vocab_size=self._facts.vocab_size,
        )
        ticket = self._served.ticket()
        found = logprobs_of(await self._last(ids, scoring_params()), ids)
        if not np.isfinite(found).all():
            raise RequestError("a log-probability is not finite", status=500)
        version = self._served.stamp(ticket)
        return json.dumps({"version": version, "logprobs": found.tolist()}).encode()

    async def _last(self, ids: list[int], params: Any) -> Any:
        """The finished output of one request to the engine."""
        self._numbers += 1
        name, last = f"mopd-sample-{self._numbers}", None
        prompt = {"prompt_token_ids": ids}
        async for output in self._engine.generate(prompt, params, request_id=name):
            last = output
        if last is None or not last.finished:
            raise RequestError("the engine gave up the request; send it again", status=503)
        return last

    async def _update(self, update: Update) -> None:
        """Between two generations: what is running ends first, what comes in waits."""
        if self._updating.locked():
            raise RequestError("another update is under way; send it again", status=503)
        async with self._updating:
            specs = await asyncio.to_thread(self._verified, update)
            try:
                async with asyncio.timeout(update.deadline_s):
                    await self._engine.pause_generation(mode="wait", clear_cache=True)
                await self._load(update, specs)
            except TimeoutError as error:
                raise RequestError("the update took too long", status=503) from error
            finally:
                await self._engine.resume_generation()

    def _verified(self, update: Update) -> list[Spec]:
        try:
            if self._known is None:
                self._known = model_specs(Path(self._engine.vllm_config.model_config.model))
            known = shapes_of(self._known)
            if update.path is not None:
                return verify_weights(Path(update.path), update.version, known)
            assert update.broadcast is not None
            specs = list(update.broadcast.tensors)
            check_shapes(shapes_of(specs), known)
            return specs
        except WeightsFileError as error:
            raise RequestError(str(error), status=422) from error

    async def _load(self, update: Update, specs: list[Spec]) -> None:
        self._served.begin()
        if update.path is not None:
            method, args = "mopd_load_files", (update.path, specs)
        else:
            meeting = update.broadcast
            assert meeting is not None
            options = {
                "first_rank": meeting.first_rank,
                "world_size": meeting.world_size,
                "backend": meeting.backend,
                "deadline_s": update.deadline_s,
            }
            method = "mopd_load_broadcast"
            args = (specs, (meeting.host, meeting.port), options)
        answers = await self._engine.collective_rpc(
            method, timeout=update.deadline_s + LATE_S, args=args
        )
        for trouble in answers:
            if trouble is not None:
                raise RequestError(f"no weights: {trouble}", status=503)
        await self._engine.collective_rpc(
            "mopd_limit_vocab", timeout=RPC_SECONDS, args=(update.vocab_size,)
        )
        if not await self._engine.reset_prefix_cache():
            raise RequestError("vLLM kept its prefix cache; send the update again", status=503)
        self._served.finish(update.version)
