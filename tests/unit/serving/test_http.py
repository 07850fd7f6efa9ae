"""Limits, statuses and secrets of one exchange."""

from __future__ import annotations

import asyncio
import socket
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mopd.serving.http import (
    BadReplyError,
    HttpOptions,
    HttpServer,
    RefusedError,
    RetryableError,
    ServerError,
)
from tests.helpers.stub_server import send

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]
LIMIT = 1 << 16


def exchange(answer: Answer, **options: Any) -> bytes:
    """What a client makes of one answer."""

    async def both() -> bytes:
        serving: list[asyncio.Task[None] | None] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            serving.append(asyncio.current_task())
            await reader.readuntil(b"\r\n\r\n")
            try:
                await answer(writer)
            except ConnectionError:
                pass
            finally:
                writer.close()

        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        settings = {"deadline_s": 30.0, "connect_s": 30.0, "max_connections": 2} | options
        server = HttpServer(f"http://127.0.0.1:{port}/", HttpOptions(**settings))
        try:
            return await server.request("GET", "/x", max_bytes=LIMIT)
        finally:
            await server.close()
            listening.close()
            # it hears that its client left; cancelled before, it would keep a full socket open
            await asyncio.gather(*filter(None, serving))

    return asyncio.run(both())


def plain(status: int, body: bytes = b"{}", **headers: str) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        await send(writer, body, status=status, headers=headers)

    return answer


def test_a_good_reply() -> None:
    assert exchange(plain(200, b"hello")) == b"hello"


@pytest.mark.parametrize(
    ("status", "kind", "reason"),
    [
        (204, BadReplyError, "status_2xx"),
        (301, RefusedError, "redirect"),
        (302, RefusedError, "redirect"),
        (307, RefusedError, "redirect"),
        (400, RefusedError, "status_4xx"),
        (401, RefusedError, "key"),
        (403, RefusedError, "key"),
        (404, RefusedError, "status_4xx"),
        (429, RetryableError, "busy"),
        (500, RetryableError, "status_5xx"),
        (503, RetryableError, "status_5xx"),
    ],
)
def test_statuses(status: int, kind: type[ServerError], reason: str) -> None:
    body = b"" if status == 204 else b"a\x1b[31mb\nc"
    with pytest.raises(kind) as caught:
        exchange(plain(status, body, Location="http://169.254.169.254/"))
    assert caught.value.reason == reason
    assert str(caught.value).isprintable() and "169.254" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "after_s"),
    [
        ("0", 0.0),
        ("7", 7.0),
        ("30", 30.0),
        ("31", 0.0),
        ("9" * 5000, 0.0),
        ("-1", 0.0),
        ("1.5", 0.0),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0),
    ],
)
def test_how_long_a_server_wants_to_be_left_alone(said: str, after_s: float) -> None:
    """Whole seconds, and not too many of them."""
    with pytest.raises(RetryableError) as caught:
        exchange(plain(429, **{"Retry-After": said}))
    assert caught.value.after_s == after_s


def test_the_key_is_never_repeated() -> None:
    with pytest.raises(RetryableError) as caught:
        exchange(plain(500, b"your key is hunter2!"), key="hunter2")
    assert "hunter2" not in str(caught.value) + repr(caught.value) and "***" in str(caught.value)


def test_a_reply_larger_than_allowed_is_dropped_while_it_comes() -> None:
    async def flood(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9000000000\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    tracemalloc.start()
    with pytest.raises(BadReplyError, match="exceeds 65536 bytes") as caught:
        exchange(flood)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.reason == "size"
    assert peak < 3_000_000


def test_a_compressed_reply_is_not_unpacked() -> None:
    with pytest.raises(BadReplyError) as caught:
        exchange(plain(200, b"\x1f\x8b", **{"Content-Encoding": "gzip"}))
    assert caught.value.reason == "encoding"


def test_a_name_that_leads_to_a_forbidden_address(monkeypatch: pytest.MonkeyPatch) -> None:
    server = HttpServer(
        "http://innocent.example", HttpOptions(deadline_s=1.0, connect_s=1.0, max_connections=1)
    )

    async def resolve() -> None:
        async def found(*arguments: object, **keys: object) -> list[Any]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", 80))]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", found)
        await server.resolve()

    with pytest.raises(RefusedError) as caught:
        asyncio.run(resolve())
    assert caught.value.reason == "address"


def test_no_proxy_of_the_environment_comes_between(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert exchange(plain(200, b"direct")) == b"direct"
