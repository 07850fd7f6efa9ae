"""The sampling server around an engine that is made up: everything but vLLM itself is the real one.

The engine runs a transformers model token by token, caches prompts, and pauses as vLLM's does.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mopd.serving import vllm_sampling
from mopd.serving.models import load_causal_lm
from mopd.serving.sampling import SampleOptions, SampleTask
from mopd.serving.vllm_sampling import SampleMiddleware
from mopd.serving.vllm_weights import WeightsExtension
from tests.helpers.stub_server import StubServer, send, send_json

PADDING = 4  # columns behind the vocabulary, all of them very likely


@dataclass(kw_only=True)
class EngineOptions:
    """How the engine is, and misbehaves."""

    logprobs_mode: str = "processed_logprobs"
    max_length: int = 256
    waits: bool = True  # False: a pause does not wait for what is running
    forgets: bool = True  # False: prompts stay cached over an update
    processes: int = 1
    slow_s: float = 0.0  # of each token
    extended: bool = True  # False: the workers lack the extension
    bias: float = 0.0  # added to the logit of token 5, as of another model


class Model(torch.nn.Module):
    """What a worker runs."""

    bias = 0.0

    def __init__(self, model_dir: Path) -> None:
        super().__init__()
        self.lm = load_causal_lm(model_dir, device=torch.device("cpu"))
        self.lm.lm_head.quant_method = SimpleNamespace(process_weights_after_loading=self._pack)
        self._pack(self.lm.lm_head)

    def _pack(self, head: torch.nn.Module) -> None:
        self.packed = head.weight.detach().clone()

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits = hidden @ self.packed.T
        logits[..., 5] += self.bias
        return torch.cat([logits, torch.full((*logits.shape[:-1], PADDING), 50.0)], dim=-1)

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """[L, V + PADDING]."""
        hidden = self.lm.model(input_ids=torch.as_tensor([ids])).last_hidden_state[0]
        return self.compute_logits(hidden)


class Worker(WeightsExtension):
    """A vLLM worker as far as the extension knows it."""

    device, rank = "cpu", 0

    def __init__(self, model_dir: Path) -> None:
        self.model = Model(model_dir)
        self.model_runner = SimpleNamespace(get_model=lambda: self.model)

    @torch.no_grad()
    def reload_weights(self, *, weights_iterator: Iterator[tuple[str, Tensor]]) -> None:
        parameters = dict(self.model.lm.named_parameters())
        for name, tensor in weights_iterator:
            parameters[name].copy_(tensor)


class Engine:
    """vLLM's `AsyncLLM` as far as the middleware knows it."""

    def __init__(self, model_dir: Path, options: EngineOptions) -> None:
        self.options = options
        self.worker = Worker(model_dir)
        self.worker.model.bias = options.bias
        self.running = 0
        self.pauses = 0
        self.moves: list[str] = []  # sleep, wake_up
        columns = self.worker.model.packed.shape[0] + PADDING
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(_api_process_count=options.processes),
            model_config=SimpleNamespace(
                model=str(model_dir),
                served_model_name="made-up",
                max_model_len=options.max_length,
                logprobs_mode=options.logprobs_mode,
                get_vocab_size=lambda: columns,
            ),
        )
        self._paused = False
        self._cache: dict[tuple[int, ...], Tensor] = {}

    async def collective_rpc(
        self, method: str, *, timeout: float, args: tuple[Any, ...] = ()
    ) -> list[Any]:
        assert timeout > 0
        if not self.options.extended:
            raise Exception(f"Call to collective_rpc method failed: no {method}")
        return [await asyncio.to_thread(getattr(self.worker, method), *args)]

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("wait", True)
        self.pauses += 1
        self._paused = True
        while self.running and self.options.waits:
            await asyncio.sleep(0.001)

    async def resume_generation(self) -> None:
        self._paused = False

    async def sleep(self, *, level: int, mode: str) -> None:
        """Drops its cache, and the weights from the device."""
        assert (level, mode) == (1, "wait") and not self.running
        self.moves.append("sleep")
        self._cache.clear()

    async def wake_up(self) -> bool:
        self.moves.append("wake_up")
        return True

    async def reset_prefix_cache(self) -> bool:
        if self.options.forgets:
            self._cache.clear()
        return True

    async def generate(
        self, prompt: Mapping[str, list[int]], params: Any, *, request_id: str
    ) -> AsyncIterator[Any]:
        while self._paused:
            await asyncio.sleep(0.001)
        assert self.moves[-1:] != ["sleep"], "it is asked while it sleeps"
        self.running += 1
        try:
            yield await self._output(prompt["prompt_token_ids"], params)
        finally:
            self.running -= 1

    async def _output(self, prompt: list[int], params: Any) -> Any:
        if params.scoring:
            scores = torch.log_softmax(self.worker.model.logits(prompt), dim=-1)
            rows = [_entry(scores[t], token) for t, token in enumerate(prompt[1:])]
            return SimpleNamespace(finished=True, prompt_logprobs=[None, *rows])
        generator = torch.Generator().manual_seed(params.seed or 0)
        ids: list[int] = []
        entries = []
        while len(ids) < params.max_tokens and ids[-1:] not in [[s] for s in params.stop_token_ids]:
            await asyncio.sleep(self.options.slow_s)
            scores = self._next(prompt, ids) / (params.temperature or 1.0)
            scores = torch.log_softmax(scores, dim=-1)
            chosen = scores.argmax()
            if params.temperature:
                chosen = torch.multinomial(scores.exp(), 1, generator=generator)
            ids.append(int(chosen))
            entries.append(_entry(scores, ids[-1]))
        answer = SimpleNamespace(token_ids=ids, logprobs=entries)
        return SimpleNamespace(finished=True, outputs=[answer])

    def _next(self, prompt: list[int], ids: list[int]) -> Tensor:
        if ids:
            return self.worker.model.logits([*prompt, *ids])[-1]
        key = tuple(prompt)
        if key not in self._cache:
            self._cache[key] = self.worker.model.logits(prompt)[-1]
        return self._cache[key]


def _entry(scores: Tensor, token: int) -> dict[int, Any]:
    return {token: SimpleNamespace(logprob=float(scores[token]))}


def _sampling_params(task: SampleTask, options: SampleOptions) -> Any:
    return SimpleNamespace(
        scoring=False,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=task.seed,
        stop_token_ids=[options.eos_id, *options.stop_ids],
    )


def make_up_params(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of vLLM's `SamplingParams`."""
    monkeypatch.setattr(vllm_sampling, "sampling_params", _sampling_params)
    monkeypatch.setattr(vllm_sampling, "scoring_params", lambda: SimpleNamespace(scoring=True))


class SampleHost(StubServer):
    """``with SampleHost(model_dir) as host: host.url``: the middleware over a socket."""

    def __init__(
        self, model_dir: Path, options: EngineOptions | None = None, *, port: int = 0
    ) -> None:
        super().__init__(lambda ids: np.zeros(0), port=port)
        self.engine = Engine(model_dir, options or EngineOptions())
        self.posts: list[str] = []  # paths
        self._app = SampleMiddleware(None)
        self._state = SimpleNamespace(state=SimpleNamespace(engine_client=self.engine))

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = [line.split(": ", 1) for line in head[1:] if line]
        size = {key.lower(): value for key, value in headers}.get("content-length", "0")
        body = await reader.readexactly(int(size))
        if path == "/health":
            await send(writer, b"")
            return True
        if not path.startswith("/mopd/"):
            await send_json(writer, {"error": "not found"}, status=404)
            return True
        if method == "POST":
            self.posts.append(path)
        scope = {
            "type": "http",
            "path": path,
            "method": method,
            "server": ("127.0.0.1", self.port),
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers],
            "app": self._state,
        }
        gone = asyncio.create_task(_closed(reader))
        try:
            status, answer = await call(self._app, scope, body, gone=gone)
        finally:
            gone.cancel()
        if status:
            await send(writer, answer, status=status)
        return bool(status)


async def _closed(reader: asyncio.StreamReader) -> None:
    """Returns when the client has closed its side."""
    while not reader.at_eof() and reader.exception() is None:
        await asyncio.sleep(0.005)


async def call(
    app: Any, scope: dict[str, Any], body: bytes, *, gone: asyncio.Task[None]
) -> tuple[int, bytes]:
    """Status and body of an ASGI application's answer; 0 where it gave none."""
    sent: list[dict[str, Any]] = []
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.shield(gone)
        return {"type": "http.disconnect"}

    async def keep(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, keep)
    if not sent:
        return 0, b""
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def read(answer: bytes) -> Any:
    """JSON of an answer."""
    return json.loads(answer)
