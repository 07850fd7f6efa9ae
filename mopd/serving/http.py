"""Bytes to and from one server: deadlines, size limits, typed errors."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

import httpx

from mopd.config.keys import printable
from mopd.config.urls import check_address, checked_url
from mopd.errors import ConfigError, MopdError

T = TypeVar("T")

HEALTH_PAUSE_S = 0.5  # between two looks at a server that starts
SHOWN = 200  # characters of a server's own words in our message
IDLE_S = 600.0  # an unused connection is kept so long, if the server keeps it
MAX_AFTER_S = 30  # of a server's own wish; a longer one is not waited for


class ServerError(MopdError, RuntimeError):
    """A request that brought nothing; ``reason`` is one word to count by, ``status`` HTTP's, where
    there was an answer."""

    status: int | None = None

    def __init__(self, server: str, reason: str, message: str) -> None:
        super().__init__(server, reason, message)
        self.server, self.reason = server, reason

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[2]}"


class RetryableError(ServerError):
    """No connection, a reset, a deadline, 429 or 5xx: another try or replica may do better.

    ``after_s``: how long the server wants to be left alone, where it says so.
    """

    after_s: float = 0.0


class RefusedError(ServerError):
    """The server understood and said no (3xx, 4xx): the same request fails again."""


class BadReplyError(ServerError):
    """A reply that is not what was asked for; a second one may be, but is not to be expected."""


def api_key(variable: str | None) -> str | None:
    """The key in an environment variable.

    Raises:
        ConfigError: the variable is not set, or holds what no header can carry.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key:
        raise ConfigError(f"api_key_env={variable}: this environment variable is not set; set it")
    if not (key.isascii() and key.isprintable()) or key != key.strip():
        raise ConfigError(f"api_key_env={variable}: holds white space or control characters")
    return key


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions:
    """``deadline_s`` is for a whole request, from the connection to the last byte, where the
    request has none of its own."""

    deadline_s: float
    connect_s: float
    max_connections: int
    key: str | None = None


class HttpServer:
    """One base URL. ``reconnected`` is set when a new connection was opened, until it is cleared.

    Redirects, proxies from the environment and compressed replies are off: a reply is at most as
    large as it is allowed to be, and comes from the server that was named.
    """

    def __init__(self, url: str, options: HttpOptions) -> None:
        self.url = checked_url(url)
        self.reconnected = True
        self._options = options
        self._client: httpx.AsyncClient | None = None

    def _opened(self) -> httpx.AsyncClient:
        """Inside the loop that uses it."""
        if self._client is None:
            options = self._options
            headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
            if options.key is not None:
                headers["Authorization"] = f"Bearer {options.key}"
            self._client = httpx.AsyncClient(
                headers=headers,
                timeout=httpx.Timeout(None, connect=options.connect_s),  # `request` has a clock
                limits=httpx.Limits(
                    max_connections=options.max_connections, keepalive_expiry=IDLE_S
                ),
                follow_redirects=False,
                trust_env=False,
            )
        return self._client

    async def resolve(self) -> None:
        """Raises RefusedError when the host's name leads to a forbidden address."""
        parts = urlsplit(self.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._options.connect_s):
                found = await loop.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        except (OSError, TimeoutError) as error:
            raise RetryableError(
                self.url, "connect", f"the host's name has no address ({error}); correct the URL"
            ) from error
        for *_, address in found:
            try:
                check_address(str(address[0]).partition("%")[0])
            except ValueError as error:
                raise RefusedError(self.url, "address", f"the host {error}") from error

    async def until_healthy(self, ask: Callable[[], Awaitable[T]], *, start_s: float) -> T:
        """What ``ask`` brings, tried again for ``start_s``.

        Raises:
            RetryableError, RefusedError, BadReplyError: of the last try.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + start_s
        while True:
            try:
                return await ask()
            except RetryableError:
                if loop.time() >= end:
                    raise
                await asyncio.sleep(HEALTH_PAUSE_S)

    async def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        max_bytes: int,
        deadline_s: float | None = None,
    ) -> bytes:
        """The body of a 200 reply.

        Raises:
            RetryableError, RefusedError, BadReplyError: at the latest at the deadline.
        """
        limit_s = self._options.deadline_s if deadline_s is None else deadline_s
        try:
            async with asyncio.timeout(limit_s):
                return await self._exchange(method, path, body, max_bytes)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise RetryableError(
                self.url,
                "timeout",
                f"no whole reply to {path} within {limit_s:g} s; raise "
                "backend.deadline_s, or look at the server",
            ) from error
        except httpx.TransportError as error:
            connecting = isinstance(error, httpx.ConnectError)
            raise RetryableError(
                self.url,
                "connect" if connecting else "reset",
                f"{'cannot connect' if connecting else 'the connection broke'} "
                f"({self._quote(str(error))}); is the server running?",
            ) from error

    async def _exchange(self, method: str, path: str, body: bytes | None, max_bytes: int) -> bytes:
        async with self._opened().stream(
            method,
            self.url + path,
            content=body,
            headers={"Content-Type": "application/json"} if body is not None else {},
            extensions={"trace": self._trace},
        ) as response:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise BadReplyError(self.url, "encoding", "the reply is compressed, unasked")
            if response.status_code != 200:
                max_bytes = min(max_bytes, 1 << 16)
            received = bytearray()
            async for chunk in response.aiter_raw():
                received += chunk
                if len(received) > max_bytes:
                    if response.status_code != 200:
                        break
                    raise BadReplyError(self.url, "size", f"the reply exceeds {max_bytes} bytes")
        try:
            self._check_status(response.status_code, path, bytes(received))
        except ServerError as error:
            error.status = response.status_code
            if isinstance(error, RetryableError):
                error.after_s = _seconds(response.headers.get("retry-after", ""))
            raise
        return bytes(received)

    async def _trace(self, event: str, info: object) -> None:
        if event.endswith("connect_tcp.complete"):
            self.reconnected = True

    def _check_status(self, status: int, path: str, body: bytes) -> None:
        if status == 200:
            return
        said = f"{path} answered {status}: {self._quote(body.decode(errors='replace'))}"
        if status == 429 or status >= 500:
            reason = "busy" if status == 429 else "status_5xx"
            raise RetryableError(self.url, reason, said)
        if status in (401, 403):
            raise RefusedError(self.url, "key", f"{said}; set backend.api_key_env")
        if 300 <= status < 400:
            raise RefusedError(self.url, "redirect", f"{path} answered {status}; name the server")
        if status < 300:
            raise BadReplyError(self.url, "status_2xx", said)
        raise RefusedError(self.url, "status_4xx", said)

    def _quote(self, text: str) -> str:
        """A server's words on one line, without our key, cut."""
        if self._options.key:
            text = text.replace(self._options.key, "***")
        return printable(text[:SHOWN])

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None


def _seconds(text: str) -> float:
    """Of a Retry-After header; 0 for dates, nonsense and whatever is too long."""
    plain = text.isascii() and text.isdigit() and len(text) <= 3
    return float(text) if plain and int(text) <= MAX_AFTER_S else 0.0
