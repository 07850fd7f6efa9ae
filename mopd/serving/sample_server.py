"""The trainer's side of one server that samples: `serving.sampling` over HTTP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

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
from mopd.serving.sampling import (
    LOGPROBS_PATH,
    LOWEST,
    SAMPLE_PATH,
    WEIGHTS_PATH,
    EngineFacts,
    Sampled,
    SampleRequest,
    Update,
    decode_answer,
    encode_request,
    encode_update,
)
from mopd.serving.versions import is_version

T = TypeVar("T")

SMALL_REPLY = 1 << 20
TOKEN_BYTES = 64  # of one token of an answer, at most: an id and a float in JSON
FACTS_S = 10.0  # what a server knows without its engine
NEVER = 501  # what another try cannot mend
START_WORDS = (
    "start vLLM with --worker-extension-cls mopd.serving.vllm_weights.WeightsExtension "
    "--middleware mopd.serving.vllm_sampling.SampleMiddleware, or `mopd serve --sample` "
    "(docs/samplers.md)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleServerOptions:
    """``update_s`` is the deadline of an update, which may move gigabytes."""

    deadline_s: float
    update_s: float
    start_s: float
    max_outstanding: int
    api_key_env: str | None = None
    served_model: str | None = None
    connect_s: float = 5.0


class _Logprobs(msgspec.Struct):
    logprobs: list[float]
    version: str | None


class SampleServer:
    """One server. All methods raise RetryableError, RefusedError or BadReplyError."""

    def __init__(self, url: str, options: SampleServerOptions) -> None:
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

    async def start(self) -> EngineFacts:
        """What the server is, as soon as it is healthy, within ``start_s``."""
        await self._http.resolve()

        async def ask() -> EngineFacts:
            await self._http.request("GET", "/health", max_bytes=SMALL_REPLY)
            return await self._facts()  # the first one looks at the engine

        return await self._http.until_healthy(ask, start_s=self._options.start_s)

    async def facts(self) -> EngineFacts:
        """What the server is, and the version that it holds now, within `FACTS_S`."""
        return await self._facts(deadline_s=min(self._options.deadline_s, FACTS_S))

    async def _facts(self, *, deadline_s: float | None = None) -> EngineFacts:
        try:
            body = await self._request("GET", WEIGHTS_PATH, deadline_s=deadline_s)
        except RefusedError as error:
            if error.reason != "status_4xx":
                raise
            raise RefusedError(
                self.url, "paths", f"has no {WEIGHTS_PATH}; {START_WORDS}"
            ) from error
        facts = self._decoded(body, EngineFacts)
        wanted = self._options.served_model
        if wanted not in (None, facts.served_model):
            raise RefusedError(
                self.url,
                "model",
                f"serves {facts.served_model!r} and not {wanted!r}; correct served_model",
            )
        if facts.version is not None and not is_version(facts.version):
            raise BadReplyError(self.url, "json", f"{facts.version[:80]!r} is no version")
        return facts

    async def sample(self, request: SampleRequest) -> tuple[str | None, list[Sampled]]:
        """As `decode_answer`."""
        tokens = len(request.tasks) * request.options.max_tokens
        body = await self._request(
            "POST",
            SAMPLE_PATH,
            encode_request(request),
            max_bytes=SMALL_REPLY + TOKEN_BYTES * tokens,
        )
        try:
            return decode_answer(body, request)
        except ValueError as error:
            raise BadReplyError(self.url, "json", f"a reply of another shape: {error}") from error

    async def logprobs(self, ids: Sequence[int]) -> tuple[str | None, np.ndarray]:
        """The version and [L - 1] float32: of the tokens of ``ids`` [L] but the first."""
        body = await self._request(
            "POST",
            LOGPROBS_PATH,
            json.dumps({"ids": list(map(int, ids))}).encode(),
            max_bytes=SMALL_REPLY + TOKEN_BYTES * len(ids),
        )
        found = self._decoded(body, _Logprobs)
        if len(found.logprobs) != len(ids) - 1 or not all(
            LOWEST <= x <= 1e-3 for x in found.logprobs
        ):
            raise BadReplyError(self.url, "json", "log-probabilities of another text")
        return found.version, np.asarray(found.logprobs, dtype=np.float32)

    async def update(self, update: Update) -> None:
        """Returns when the server holds ``update.version``."""
        # an update ends at its own deadline, and says so; this is for a server that hangs
        deadline_s = self._options.update_s + self._options.deadline_s
        body = await self._request(
            "POST", WEIGHTS_PATH, encode_update(update), deadline_s=deadline_s
        )
        version = self._decoded(body, EngineFacts).version
        if version != update.version:
            raise RetryableError(self.url, "version", f"took {update.version} and has {version}")

    async def _request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        max_bytes: int = SMALL_REPLY,
        deadline_s: float | None = None,
    ) -> bytes:
        try:
            return await self._http.request(
                method, path, body, max_bytes=max_bytes, deadline_s=deadline_s
            )
        except RetryableError as error:
            if error.status == NEVER:
                raise RefusedError(self.url, "status_501", str(error.args[-1])) from error
            raise

    def _decoded(self, body: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
            raise BadReplyError(self.url, "json", f"a reply of another shape: {error}") from error

    async def close(self) -> None:
        await self._http.close()
