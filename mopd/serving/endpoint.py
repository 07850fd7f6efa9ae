"""One inference server: what it serves, and prompts scored by it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np

from mopd.serving import drafts
from mopd.serving.drafts import Draft
from mopd.serving.http import (
    BadReplyError,
    HttpOptions,
    HttpServer,
    RefusedError,
    RetryableError,
    ServerError,
    api_key,
)
from mopd.serving.protocols import SMALL_REPLY, Query, ServerProtocol
from mopd.serving.reply import ArrayRows, Entries
from mopd.serving.scoring import ScoredSequence

PROBE = ScoredSequence(ids=np.array([0, 1]), start=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointOptions:
    """How to talk to the servers of one model.

    Args:
        protocols: in order of preference; the last is taken where a server has none of the others.
        temperature: of the loss, for protocols that send log-sum-exps.
        api_key_env: the environment variable with the key; None sends none.
        served_model: the name to ask for; None takes the only one that the server lists.
        start_s: how long a server may take until it is healthy.
    """

    protocols: tuple[ServerProtocol, ...]
    deadline_s: float
    max_outstanding: int
    start_s: float
    temperature: float = 1.0
    connect_s: float = 5.0
    api_key_env: str | None = None
    served_model: str | None = None


class _Tokens(msgspec.Struct):
    tokens: list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]]


class Endpoint:
    """``probe`` is asked before anything is believed that came over a new connection.

    Each of its requests has the deadline of a request; the check as a whole has none of its own,
    so that a server that is slow and answers every time is not given up for ever.
    """

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
        self.deadline_s, self.start_s = options.deadline_s, options.start_s
        self.protocol = options.protocols[-1]  # `find_model` may find a better one
        self.model: str = ""
        self.max_length: int | None = None  # tokens of a prompt, from the server's own limit
        self.probe: Callable[[Endpoint], Awaitable[None]] = Endpoint.find_model
        self.probe_interval = 0  # requests for scores between two probes; 0: new connections only
        self._unprobed = 0
        self._check: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Waits until the server is healthy and finds its model's name and limit.

        Raises:
            RetryableError: not healthy in time. RefusedError: no such model, no access.
        """
        await self._http.resolve()
        await self._http.until_healthy(self.find_model, start_s=self._options.start_s)

    async def find_model(self) -> None:
        """Asks what is served, and which of the protocols it is served by.

        Raises:
            RefusedError: another kind of server, no such model, another one than before, or a
                host whose name leads elsewhere by now.
        """
        await self._http.resolve()
        try:
            listed = await self.protocol.models(self._get)
        except (ValueError, RefusedError) as error:
            if isinstance(error, RefusedError) and error.reason != "status_4xx":
                raise
            text = str(error.args[-1])
            raise RefusedError(
                self.url, "models", f"{text}; is it a server of this backend.type?"
            ) from error
        wanted = self._options.served_model
        names = [model.name for model in listed]
        found = [model for model in listed if wanted in (None, model.name)]
        if len(found) != 1:
            what = "several models" if wanted is None else f"no model {wanted!r}"
            raise RefusedError(
                self.url,
                "model",
                f"serves {what} ({names!r}); set backend.served_model to the one that is meant",
            )
        if self.model not in ("", found[0].name):
            raise RefusedError(
                self.url, "model", f"served {self.model!r} before and now {found[0].name!r}"
            )
        self.model = found[0].name
        self.max_length = found[0].max_length
        self.protocol = await self._best_protocol()

    async def _get(self, path: str) -> bytes:
        return await self._http.request("GET", path, max_bytes=SMALL_REPLY)

    async def _best_protocol(self) -> ServerProtocol:
        """The first that brings scores of two tokens; the last needs no proof, unless another
        one is there and broken.

        Raises:
            RetryableError: no answer in time, or 5xx from all that the server has.
        """
        *others, last = self._options.protocols
        broken: RetryableError | None = None
        for protocol in others:
            try:
                await self._request(protocol, (PROBE,), 1, 1.0)
            except (RefusedError, BadReplyError):
                continue
            except RetryableError as error:
                if error.reason != "status_5xx":
                    raise
                broken = broken or error
                continue
            return protocol
        if broken is not None:
            await self._stand_in(last, broken)
        return last

    async def _stand_in(self, protocol: ServerProtocol, broken: RetryableError) -> None:
        """Whether ``protocol`` answers where a better one fails."""
        try:
            await self._request(protocol, (PROBE,), 1, 1.0)
        except ServerError as error:
            raise RetryableError(
                self.url,
                broken.reason,
                f"{broken.args[2]}, and {protocol.path} does no better ({error.args[2]}); look "
                "at the server's log, and start it again",
            ) from error

    async def score(
        self, sequences: Sequence[ScoredSequence], k: int | None
    ) -> list[Entries | ArrayRows]:
        """Of each sequence, what predicts the tokens behind its start: the ``k`` likeliest tokens
        and that token; None asks for the whole vocabulary.

        Raises:
            RetryableError, RefusedError, BadReplyError, and what ``probe`` raises.
        """
        self._unprobed += 1
        if self._unverified():
            await self.verify()
        protocol, temperature = self.protocol, self._options.temperature
        try:
            reply = await self._ask(sequences, k, temperature)
        except RefusedError:
            if self._http.reconnected:
                await self.verify()
            if self.protocol is protocol:
                raise
            reply = await self._ask(sequences, k, temperature)  # it came back with other paths
        if self._http.reconnected:
            await self.verify()
        return reply

    async def write(self, draft: Draft) -> list[tuple[np.ndarray, bool]]:
        """Per prompt a text [S] in ids, and whether its turn ended. For vLLM and `mopd serve`.

        Raises:
            RetryableError, RefusedError, BadReplyError, and what ``probe`` raises.
        """
        if self._unverified():
            await self.verify()
        name = None if self.protocol.is_identity else self.model
        body = await self._http.request(
            "POST", drafts.PATH, draft.body(name), max_bytes=draft.max_bytes
        )
        if self._http.reconnected:
            await self.verify()
        try:
            return draft.read(body)
        except ValueError as error:
            raise BadReplyError(self.url, "json", f"a reply of another shape: {error}") from error

    async def verify(self) -> None:
        """One probe for all that wait for it; it goes on when they are tired of waiting.

        Raises:
            RetryableError, RefusedError, BadReplyError, and what ``probe`` raises.
        """
        if self._check is None or self._check.done():
            self._check = asyncio.create_task(self._probed())
            self._check.add_done_callback(_told)
        await asyncio.shield(self._check)

    async def _probed(self) -> None:
        await self.probe(self)
        # only now: the connections that it opened itself are known as well
        self._http.reconnected, self._unprobed = False, 0

    def _unverified(self) -> bool:
        return self._http.reconnected or 0 < self.probe_interval < self._unprobed

    async def _ask(
        self, sequences: Sequence[ScoredSequence], k: int | None, temperature: float
    ) -> list[Entries | ArrayRows]:
        protocol = self.protocol
        groups = [(one,) for one in sequences] if protocol.single else [tuple(sequences)]
        found: list[Entries | ArrayRows] = []
        for group in groups:
            found += await self._request(protocol, group, k, temperature)
        return found

    async def _request(
        self,
        protocol: ServerProtocol,
        sequences: tuple[ScoredSequence, ...],
        k: int | None,
        temperature: float,
    ) -> Sequence[Entries | ArrayRows]:
        query = Query(
            request=uuid.uuid4().hex,
            model=self.model,
            sequences=sequences,
            top_k=k,
            temperature=temperature,
        )
        body = await self._http.request(
            "POST", protocol.path, protocol.body(query), max_bytes=protocol.max_bytes(query)
        )
        try:
            reply = protocol.read(body, query)
        except ValueError as error:
            raise BadReplyError(self.url, "json", f"a reply of another shape: {error}") from error
        if reply.model is not None and reply.model != self.model:
            raise BadReplyError(
                self.url, "model", f"a reply of {reply.model!r}, not {self.model!r}"
            )
        return reply.prompts

    async def probe_score(
        self, prompts: Sequence[np.ndarray], k: int, *, temperature: float = 1.0
    ) -> list[Entries | ArrayRows]:
        """As `score`, for the probe itself: all tokens of each prompt [T] but the first."""
        whole = [ScoredSequence(ids=prompt, start=1) for prompt in prompts]
        return await self._ask(whole, k, temperature)

    async def tokenize(
        self, what: str | Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> np.ndarray | None:
        """The server's own tokens of a text, or of a chat by its template; None: it gives none."""
        if not self.protocol.chats:
            return None
        body: dict[str, Any] = {"add_special_tokens": False}
        if not self.protocol.is_identity:
            body["model"] = self.model
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


def _told(check: asyncio.Task[None]) -> None:
    """A failure that nobody waited for is none: the next request asks again."""
    if not check.cancelled():
        check.exception()
