"""A server in every reply shape whose scores are a pure function of the prefix, with faults.

It speaks HTTP by hand, so that a fault may write whatever it likes to the socket.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from mopd.serving.scoring import (
    MODEL_PATH,
    SCORE_PATH,
    RequestError,
    ScoreLimits,
    join_rows,
    read_request,
)
from mopd.serving.wire import CONTENT_TYPE
from mopd.tokens.chat import ChatTokenizer
from tests.helpers.stub_scorers import Scorer
from tests.helpers.stub_shapes import (
    COMPLETIONS,
    GENERATE,
    SGLANG,
    TRL,
    Asked,
    Message,
    Said,
    openai,
    raw_rows,
    sglang,
    trl,
    vllm,
)

# Writes to the socket; True: the connection is still in order.
Fault = Callable[[asyncio.StreamWriter, dict[str, Any]], Awaitable[bool]]


@dataclass(kw_only=True)
class StubOptions:
    """What the server claims and allows; ``fault(number, request)`` chooses a fault or None."""

    model: str = "stub"
    max_logprobs: int = 64
    max_model_len: int = 1024
    vocab_size: int | None = None  # refuses ids beyond it; None takes anything
    width: int | None = None  # lists ids up to it; None: as the scorer
    names: Sequence[str] | None = None  # strings of the tokens, for the OpenAI shape
    key: str | None = None
    refusal: str = "no"  # what it says to who has another key
    chat: Callable[[Any], list[int]] | None = None  # /tokenize, chats alone
    tokenizer: ChatTokenizer | None = None  # /tokenize, chats and texts
    ordered: bool = True  # False: a score depends on the place in the batch
    tempered: bool = False  # True: applies the temperature
    token_ids: bool = True  # echoes the ids, as newer servers do
    generate: bool = False  # /inference/v1/generate, as with vLLM's --enable-scale-out
    lists_models: bool = True  # /v1/models
    written_status: int = 200  # of texts that it is to write
    fault: Callable[[int, dict[str, Any]], Fault | None] = field(default=lambda number, body: None)


class StubServer:
    """``with StubServer(scorer) as server: server.url``; ``requests`` are the bodies it got."""

    def __init__(
        self,
        scorer: Scorer,
        options: StubOptions | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.options = options or StubOptions()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.tokenized: list[dict[str, Any]] = []  # what /tokenize answered
        self.busy = self.busiest = 0
        self._scorer = scorer
        self._host, self._port = host, port
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> StubServer:
        self._thread.start()
        assert self._ready.wait(10.0)
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self.port}"

    @property
    def port(self) -> int:
        return self._port

    def stop(self) -> None:
        """Closes the port and resets every connection, as a killed process does."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10.0)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        self._stopping = asyncio.Event()
        server = await asyncio.start_server(self._accept, self._host, self._port)
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopping.wait()
        for listening in server.sockets:
            self._loop.remove_reader(listening.fileno())
        await asyncio.sleep(0)  # asyncio loses the sockets that it took but has not passed on
        server.close()
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)  # a transport closes its socket in the loop's next round
        await asyncio.sleep(0)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Known before its task runs, so that `stop` resets it in any case."""
        self._writers.add(writer)
        task = asyncio.create_task(self._connection(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        if self.options.key and headers.get("authorization") != f"Bearer {self.options.key}":
            await send_json(writer, {"error": self.options.refusal}, status=401)
        elif method == "POST" and path == SCORE_PATH:
            return await self._rows(writer, body, headers)
        elif method == "POST" and path in (COMPLETIONS, GENERATE, SGLANG, TRL):
            if path == GENERATE and not self.options.generate:
                await send_json(writer, {"error": {"message": "disabled"}}, status=403)
                return True
            asked = json.loads(body)
            if asked.get("seed") is not None:
                if self.options.written_status != 200:
                    await send_json(writer, {"error": "no"}, status=self.options.written_status)
                    return True
                reply = self._written(asked)
                said = partial(send_json, writer, reply)
                return await self._answer(writer, asked, headers, reply, said)
            return await self._lists(writer, path, asked, headers)
        else:
            await self._about(writer, path, body)
        return True

    async def _about(self, writer: asyncio.StreamWriter, path: str, body: bytes) -> None:
        options = self.options
        listed = {"id": options.model, "max_model_len": options.max_model_len}
        answers: dict[str, Callable[[], Any]] = {
            "/health/": lambda: {"status": "ok"},
            "/get_model_info": lambda: {"model_path": options.model, "is_generation": True},
            MODEL_PATH: lambda: {
                "model": options.model,
                "vocab_size": self._limits().vocab_size,
                "max_length": self._limits().max_length,
            },
        }
        if options.lists_models:
            answers["/v1/models"] = lambda: {"data": [listed]}
        if path == "/health":
            await send(writer, b"")
        elif path == "/tokenize":
            await self._tokenize(writer, json.loads(body))
        elif path in answers:
            await send_json(writer, answers[path]())
        else:
            await send_json(writer, {"error": "not found"}, status=404)

    async def _tokenize(self, writer: asyncio.StreamWriter, asked: dict[str, Any]) -> None:
        chat, tokenizer = self.options.chat, self.options.tokenizer
        ids = None
        if "messages" in asked and chat is not None:
            ids = chat(asked["messages"])
        elif "messages" in asked and tokenizer is not None:
            add = asked["add_generation_prompt"]
            ids = tokenizer.chat_ids(asked["messages"], add_generation_prompt=add)
        elif tokenizer is not None:
            ids = tokenizer.text_ids(asked["prompt"])
        if ids is None:
            await send_json(writer, {"error": "not found"}, status=404)
        else:
            self.tokenized.append(asked)
            await send_json(writer, {"tokens": ids})

    def _limits(self) -> ScoreLimits:
        size = self.options.vocab_size or self._scorer([0, 1]).shape[1]
        return ScoreLimits(vocab_size=size, max_length=self.options.max_model_len - 1)

    async def _rows(
        self, writer: asyncio.StreamWriter, body: bytes, headers: dict[str, str]
    ) -> bool:
        """As `mopd serve`: its own reading of requests and its own arrays."""
        try:
            request = read_request(body, limits=self._limits())
        except RequestError as error:
            await send_json(writer, {"error": {"message": error.message}}, status=error.status)
            return True
        parts = []
        for place, sequence in enumerate(request.sequences):
            ids = sequence.ids.tolist()
            logits = self._logprobs(ids, request.temperature, place)[:, : request.vocab_size]
            parts.append(
                raw_rows(
                    logits[sequence.start - 1 :],
                    ids[sequence.start :],
                    top_k=request.top_k,
                    temperature=request.temperature,
                )
            )
        header = request.header(model=self.options.model)
        message = Message(header=header, rows=join_rows(parts))

        async def answer() -> None:
            await send(writer, message.encoded(), headers={"Content-Type": CONTENT_TYPE})

        return await self._answer(writer, json.loads(body), headers, message, answer)

    def _written(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Texts drawn token by token, or greedy at temperature 0; one seed for a request."""
        prompt = asked["prompt"]
        prompts = prompt if isinstance(prompt[0], list) else [prompt]
        choices = [
            {"index": index, "token_ids": self._text(ids, asked)}
            for index, ids in enumerate(prompts)
        ]
        # in the order in which they were done, as a server may
        return {"model": self.options.model, "choices": choices[::-1]}

    def _text(self, ids: list[int], asked: dict[str, Any]) -> list[int]:
        random = np.random.default_rng(asked["seed"])
        found: list[int] = []
        while len(found) < asked["max_tokens"] and not (
            found and found[-1] in asked["stop_token_ids"]
        ):
            row = self._scorer([*ids, *found, 0])[-1].astype(np.float64)
            if asked["temperature"] == 0.0:
                found.append(int(row.argmax()))
            else:
                chances = np.exp((row - row.max()) / asked["temperature"])
                found.append(int(random.choice(len(row), p=chances / chances.sum())))
        return found

    async def _lists(
        self,
        writer: asyncio.StreamWriter,
        path: str,
        request: dict[str, Any],
        headers: dict[str, str],
    ) -> bool:
        asked = Asked.of(path, request)
        if problem := self._refusal(asked):
            self._note(request, headers)
            # TRL's server raises and does not say what
            status = 500 if path == TRL else 400
            await send_json(writer, {"error": {"message": problem}}, status=status)
            return True
        reply = self._reply(path, request)

        async def answer() -> None:
            await send_json(writer, reply)

        return await self._answer(writer, request, headers, reply, answer)

    def _note(self, request: dict[str, Any], headers: dict[str, str]) -> Fault | None:
        self.requests.append(request)
        self.headers.append(headers)
        return self.options.fault(len(self.requests) - 1, request)

    async def _answer(
        self,
        writer: asyncio.StreamWriter,
        request: dict[str, Any],
        headers: dict[str, str],
        reply: Any,
        answer: Callable[[], Awaitable[None]],
    ) -> bool:
        fault = self._note(request, headers)
        self.busy += 1
        self.busiest = max(self.busy, self.busiest)
        try:
            await asyncio.sleep(0.001)
            if fault is not None:
                return await fault(writer, reply)
            await answer()
        finally:
            self.busy -= 1
        return True

    def _refusal(self, asked: Asked) -> str | None:
        options = self.options
        if asked.model not in (None, options.model):
            return f"the model {asked.model} does not exist"
        if asked.k > options.max_logprobs:
            return f"requested {asked.k} logprobs, which is more than {options.max_logprobs}"
        for ids in asked.sequences:
            if len(ids) >= options.max_model_len:
                return "the prompt is too long"
            if options.vocab_size is not None and max(ids) >= options.vocab_size:
                return "a token id is out of the vocabulary"
        return None

    def _reply(self, path: str, request: Mapping[str, Any]) -> Any:
        asked, options = Asked.of(path, request), self.options
        every = [
            Said(ids=ids, rows=self._logprobs(ids, asked.temperature, place))
            for place, ids in enumerate(asked.sequences)
        ]
        if path == TRL:
            return trl(every, asked)
        if path == SGLANG:
            return [
                sglang(said, k=asked.k, start=start)
                for said, start in zip(every, asked.starts, strict=True)
            ]
        if request.get("echo"):
            found = [openai(said, k=asked.k, names=options.names) for said in every]
        else:
            width, token_ids = options.width, options.token_ids
            found = [vllm(said, k=asked.k, width=width, token_ids=token_ids) for said in every]
        if path == GENERATE:
            return {"request_id": "r", "model": options.model, **found[0]}
        choices = [
            {"index": i, "text": "x", "finish_reason": "length", **shape}
            for i, shape in enumerate(found)
        ]
        return {"id": "cmpl-1", "model": options.model, "choices": choices, "usage": {}}

    def _logprobs(self, ids: Sequence[int], temperature: float, place: int) -> np.ndarray:
        rows = self._scorer(ids)
        if self.options.tempered:
            rows = rows / temperature
            rows = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        if not self.options.ordered:
            rows = np.roll(rows, place, axis=1)
        return rows


async def send_json(writer: asyncio.StreamWriter, value: Any, *, status: int = 200) -> None:
    await send(writer, json.dumps(value, separators=(",", ":")).encode(), status=status)


async def send(
    writer: asyncio.StreamWriter,
    body: bytes,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> None:
    fields = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    fields |= dict(headers or {})
    lines = [f"HTTP/1.1 {status} X", *(f"{k}: {v}" for k, v in fields.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    await writer.drain()
