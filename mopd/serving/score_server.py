"""The scoring and the sampling paths around engines, with the standard library's server."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mopd.serving.address import base_url
from mopd.serving.completions import (
    COMPLETIONS_PATH,
    CompletionRequest,
    encode_completion,
    read_completion,
)
from mopd.serving.generation import AbandonedError
from mopd.serving.lease import LeaseTimeout
from mopd.serving.sampling import METHODS
from mopd.serving.scoring import (
    MAX_BODY_BYTES,
    MODEL_PATH,
    SCORE_PATH,
    RequestError,
    ScoreLimits,
    Scorer,
    check_exposure,
    is_authorised,
    read_request,
)
from mopd.serving.wire import CONTENT_TYPE, encode_header, encode_rows

HEALTH_PATH = "/health"
SOCKET_SECONDS = 30.0
CLOSE_SECONDS = 10.0  # for what is under way when a server is closed
POLL_SECONDS = 0.05
JSON = "application/json"
SCORING = {SCORE_PATH: ("POST",), MODEL_PATH: ("GET",)}
WRITING = {COMPLETIONS_PATH: ("POST",)}

Gone = Callable[[], bool]
Answer = tuple[str, list[bytes]]  # content type, parts of the body


class Sampling(Protocol):
    """An engine behind the paths of `sampling.METHODS`."""

    def answer(self, path: str, method: str, body: bytes, *, gone: Gone, closing: Gone) -> bytes:
        """The JSON of a 200 answer; raises RequestError, and AbandonedError where the client is
        ``gone``."""
        ...


@runtime_checkable
class Writer(Protocol):
    """A scorer that answers prompts as well."""

    fingerprint: str
    limits: ScoreLimits

    def write(self, request: CompletionRequest, *, gone: Gone) -> list[np.ndarray]:
        """Per prompt the ids of an answer; raises AbandonedError where the client is ``gone``."""
        ...


class ScoreServer(ThreadingHTTPServer):
    """Serves ``scorer``, ``sampler`` or both on ``host``; port 0 takes a free one, see ``url``.

    Call `serve_forever`, or `start` for a thread of its own; `close` or leaving the ``with`` ends
    it. Then nothing is served any more, open connections are cut, and what was computed for them
    stops at its next token; a pass of a scorer, or a broadcast that has begun, ends by itself.

    Raises:
        ConfigError: ``host`` is not loopback and there is no token.
    """

    daemon_threads = True  # a connection that hangs must not hold the process
    allow_reuse_address = True  # a server that is started again takes its port at once
    # All ranks connect at once; whom a queue of five turns away comes again a second later.
    request_queue_size = 1024

    def __init__(
        self,
        host: str,
        port: int,
        *,
        scorer: Scorer | None = None,
        sampler: Sampling | None = None,
        token: str | None,
    ) -> None:
        check_exposure(host, token=token)
        assert scorer is not None or sampler is not None, "nothing to serve"
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.scorer, self.sampler, self.token = scorer, sampler, token
        self.methods: dict[str, tuple[str, ...]] = {
            HEALTH_PATH: ("GET",),
            **(SCORING if scorer is not None else {}),
            **(WRITING if isinstance(scorer, Writer) else {}),
            **(METHODS if sampler is not None else {}),
        }
        self.on_close: Callable[[], None] = lambda: None  # lets go of the engines
        self._closing = threading.Event()
        self._open: dict[threading.Thread, socket.socket] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        """As clients on this machine write it."""
        host, port = self.server_address[:2]
        return base_url(str(host), port)

    def is_closing(self) -> bool:
        """Whether nobody will be answered any more."""
        return self._closing.is_set()

    def start(self) -> None:
        """Serves in a thread of its own, once."""
        assert self._thread is None
        self._thread = threading.Thread(
            target=self.serve_forever, args=(POLL_SECONDS,), name="mopd-serve", daemon=True
        )
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the server and its threads; safe to call twice, and not inside `serve_forever`."""
        if self._thread is not None:
            self.shutdown()
            self._thread.join()
        self.server_close()

    def server_close(self) -> None:
        """Closes the listener, cuts the connections, lets go of the engines, and waits for the
        threads of the connections: those that waited for a turn have none any more."""
        super().server_close()
        self._closing.set()
        with self._lock:
            still = dict(self._open)
        for connection in still.values():
            with suppress(OSError):  # it has just ended
                connection.shutdown(socket.SHUT_RDWR)
        self.on_close()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in still:
            thread.join(max(0.0, deadline - time.monotonic()))

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), daemon=True
        )
        with self._lock:
            # those that ended leave here, and not by themselves: they would still run for a moment
            self._open = {one: its for one, its in self._open.items() if one.is_alive()}
            self._open[thread] = request
        thread.start()


class _Handler(BaseHTTPRequestHandler):
    server: ScoreServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    server_version = "mopd"
    sys_version = ""
    timeout = SOCKET_SECONDS

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def log_message(self, format: str, *args: object) -> None:
        """Silent: paths and agents are a client's text."""

    def _answer(self, method: str) -> None:
        try:
            content_type, parts = self._found(method)
        except RequestError as error:
            # the body may be unread, so this connection cannot carry another request
            self.close_connection = True
            self._send_error(error.message, status=error.status)
        except LeaseTimeout as error:  # a busy server, which is well
            self._send_error(str(error), status=429)
        except (AbandonedError, ConnectionError, TimeoutError):  # of the socket
            self.close_connection = True
        except Exception:
            self.close_connection = True
            self._send_error("the engine failed", status=500)
            raise
        else:
            self._send(200, content_type, *parts)

    def _found(self, method: str) -> Answer:
        """What a 200 answer says."""
        server = self.server
        # who watches the server needs no token
        if self.path != HEALTH_PATH and not is_authorised(
            self.headers.get("Authorization"), token=server.token
        ):
            raise RequestError("a wrong token, or none", status=401)
        if self.path not in server.methods:
            raise RequestError("no such path", status=404)
        if method not in server.methods[self.path]:
            raise RequestError("another method", status=405)
        if self.path == HEALTH_PATH:
            return JSON, [b"{}"]
        if self.path in METHODS:
            assert server.sampler is not None
            body = self._body() if method == "POST" else b""
            options = {"gone": self._is_gone, "closing": server.is_closing}
            return JSON, [server.sampler.answer(self.path, method, body, **options)]
        assert server.scorer is not None
        if self.path == MODEL_PATH:
            return JSON, [json.dumps(_model(server.scorer)).encode()]
        if self.path == COMPLETIONS_PATH:
            assert isinstance(server.scorer, Writer)
            return JSON, [self._written(server.scorer)]
        return self._scored(server.scorer)

    def _written(self, writer: Writer) -> bytes:
        request = read_completion(self._body(), limits=writer.limits)
        answers = writer.write(request, gone=self._is_gone)
        return encode_completion(writer.fingerprint, answers)

    def _scored(self, scorer: Scorer) -> Answer:
        request = read_request(self._body(), limits=scorer.limits)
        rows = encode_rows(scorer.score(request), wire=request.wire)
        return CONTENT_TYPE, [encode_header(request.header(model=scorer.fingerprint)), rows]

    def _is_gone(self) -> bool:
        """Whether the client has closed its side, or this server has cut the connection. What a
        client sends early is no reason to think so."""
        watch = select.poll()
        try:
            watch.register(self.connection, select.POLLIN)
            return bool(watch.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 16):
            raise RequestError("a Content-Length is needed", status=411)
        if int(length) > MAX_BODY_BYTES:
            raise RequestError(f"a body over {MAX_BODY_BYTES} bytes", status=413)
        body = self.rfile.read(int(length))
        if len(body) != int(length):
            raise RequestError("the body ended early")
        return body

    def _send_error(self, message: str, *, status: int) -> None:
        self._send(status, JSON, json.dumps({"error": {"message": message}}).encode())

    def _send(self, status: int, content_type: str, *parts: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(sum(map(len, parts))))
        if self.close_connection:
            self.send_header("Connection", "close")
        try:
            self.end_headers()
            for part in parts:
                self.wfile.write(part)
        except ConnectionError:  # nobody reads it any more
            self.close_connection = True


def _model(scorer: Scorer) -> dict[str, str | int]:
    limits = scorer.limits
    return {
        "model": scorer.fingerprint,
        "vocab_size": limits.vocab_size,
        "max_length": limits.max_length,
    }
