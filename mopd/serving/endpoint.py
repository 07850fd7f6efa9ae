"""One inference server: what it serves, and prompts scored by it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import numpy as np

from mopd.serving.http import (
    BadReplyError,
    HttpOptions,
    HttpServer,
    RefusedError,
    RetryableError,
    api_key,
)
from mopd.serving.reply import Entries, Reply, Shape, decode_openai, decode_vllm

ENTRY_BYTES = 512  # of one listed token in JSON, at most: vLLM writes about 80
SMALL_REPLY = 1 << 20
HEALTH_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointOptions:
    """How to talk to the servers of one model.

    Args:
        shape: "vllm" asks for ``prompt_logprobs``, "openai" for the echo of the prompt.
        api_key_env: the environment variable with the key; None sends none.
        served_model: the name to ask for; None takes the only one that the server lists.
        start_s: how long a server may take until it is healthy.
        names: string -> id of the tokens, for shape "openai".
    """

    shape: Shape
    deadline_s: float
    max_outstanding: int
    start_s: float
    connect_s: float = 5.0
    api_key_env: str | None = None
    served_model: str | None = None
    names: Mapping[str, int] = field(default_factory=dict)


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Tokens(msgspec.Struct):
    tokens: list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]]


class Endpoint:
    """``probe`` is asked before anything is believed that came over a new connection."""

    def __init__(self, url: str, options: EndpointOptions) -> None:
        self._options = options
        self._http = HttpServer(
            url,
            HttpOptions(
                deadline_s=options.deadline_s,
                connect_s=min(options.connect_s, options.deadline_s),
                max_connections=options.max_outstanding + 2,
                key=api_key(options.api_key_env),
            ),
        )
        self.url = self._http.url
        self.model: str = ""
        self.max_length: int | None = None  # tokens of a prompt, from the server's own limit
        self.probe: Callable[[Endpoint], Any] | None = None
        self.probe_interval = 0  # requests for scores between two probes; 0: new connections only
        self._unprobed = 0
        self._probing = asyncio.Lock()

    async def start(self) -> None:
        """Waits until the server is healthy and finds its model's name and limit.

        Raises:
            RetryableError: not healthy in time. RefusedError: no such model, no access.
        """
        await self._http.resolve()
        loop = asyncio.get_running_loop()
        end = loop.time() + self._options.start_s
        while True:
            try:
                await self.find_model()
                return
            except RetryableError:
                if loop.time() >= end:
                    raise
                await asyncio.sleep(HEALTH_PAUSE_S)

    async def find_model(self) -> None:
        """Asks ``/v1/models``, after ``/health`` where the server has it."""
        if self._options.shape == "vllm":
            await self._http.request("GET", "/health", max_bytes=SMALL_REPLY)
        body = await self._http.request("GET", "/v1/models", max_bytes=SMALL_REPLY)
        try:
            listed = msgspec.json.decode(body, type=_Models).data
        except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
            raise RefusedError(
                self.url, "models", f"/v1/models gave no list of models ({error}); is it vLLM?"
            ) from error
        wanted = self._options.served_model
        names = [model.id for model in listed]
        found = [model for model in listed if wanted in (None, model.id)]
        if len(found) != 1:
            what = "several models" if wanted is None else f"no model {wanted!r}"
            raise RefusedError(
                self.url,
                "model",
                f"serves {what} ({names!r}); set backend.served_model to the one that is meant",
            )
        if self.model not in ("", found[0].id):
            raise RefusedError(
                self.url, "model", f"served {self.model!r} before and now {found[0].id!r}"
            )
        self.model = found[0].id
        limit = found[0].max_model_len
        # one token more is always written behind the prompt
        self.max_length = None if limit is None else limit - 1

    async def score(
        self, prompts: Sequence[np.ndarray], k: int, *, temperature: float = 1.0
    ) -> list[Entries]:
        """The ``k`` likeliest tokens before each token of each prompt [T], and that token.

        Raises:
            RetryableError, RefusedError, BadReplyError, and what ``probe`` raises.
        """
        self._unprobed += 1
        if self._unverified():
            await self._verify()
        reply = await self._ask(prompts, k, temperature)
        if self._http.reconnected:
            await self._verify()
        return reply.prompts

    async def _verify(self) -> None:
        """One probe for all requests that wait for it."""
        async with self._probing:
            if self._unverified():
                # before the probe: it must see the connections that it opens itself as known
                if self.probe is not None:
                    await self.probe(self)
                self._http.reconnected, self._unprobed = False, 0

    def _unverified(self) -> bool:
        return self._http.reconnected or 0 < self.probe_interval < self._unprobed

    async def _ask(self, prompts: Sequence[np.ndarray], k: int, temperature: float) -> Reply:
        entries = (k + 1) * sum(len(prompt) for prompt in prompts)
        body = await self._http.request(
            "POST",
            "/v1/completions",
            msgspec.json.encode(self._body(prompts, k, temperature)),
            max_bytes=SMALL_REPLY + ENTRY_BYTES * entries,
        )
        try:
            if self._options.shape == "vllm":
                reply = decode_vllm(body, len(prompts))
            else:
                reply = decode_openai(body, len(prompts), names=self._options.names)
        except ValueError as error:
            raise BadReplyError(self.url, "json", f"a reply of another shape: {error}") from error
        if reply.model is not None and reply.model != self.model:
            raise BadReplyError(
                self.url, "model", f"a reply of {reply.model!r}, not {self.model!r}"
            )
        return reply

    async def probe_score(
        self, prompts: Sequence[np.ndarray], k: int, *, temperature: float = 1.0
    ) -> list[Entries]:
        """As `score`, for the probe itself."""
        return (await self._ask(prompts, k, temperature)).prompts

    def _body(self, prompts: Sequence[np.ndarray], k: int, temperature: float) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": [prompt.tolist() for prompt in prompts],
            "temperature": temperature,
        }
        if self._options.shape == "vllm":
            return body | {
                "max_tokens": 1,
                "prompt_logprobs": k,
                "add_special_tokens": False,
                "return_token_ids": True,
            }
        return body | {
            "max_tokens": 0,
            "echo": True,
            "logprobs": k,
            "return_tokens_as_token_ids": True,  # vLLM's: names that are never ambiguous
        }

    async def tokenize(
        self, what: str | Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> np.ndarray | None:
        """The server's own tokens of a text, or of a chat by its template; None: it gives none."""
        if self._options.shape != "vllm":
            return None
        body: dict[str, Any] = {"model": self.model, "add_special_tokens": False}
        if isinstance(what, str):
            body["prompt"] = what
        else:
            body["messages"] = [dict(message) for message in what]
            body["add_generation_prompt"] = add_generation_prompt
        try:
            said = await self._http.request(
                "POST", "/tokenize", msgspec.json.encode(body), max_bytes=SMALL_REPLY
            )
            return np.array(msgspec.json.decode(said, type=_Tokens).tokens, dtype=np.int64)
        except (RefusedError, msgspec.MsgspecError):  # has no such path, or no template
            return None

    async def close(self) -> None:
        await self._http.close()
