"""The scoring endpoint around a `Scorer`, with the standard library's server."""

from __future__ import annotations

import json
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mopd.serving.scoring import (
    MAX_BODY_BYTES,
    MODEL_PATH,
    SCORE_PATH,
    RequestError,
    Scorer,
    check_exposure,
    is_authorised,
    read_request,
)
from mopd.serving.wire import CONTENT_TYPE, encode_header, encode_rows

SOCKET_SECONDS = 30.0


class ScoreServer(ThreadingHTTPServer):
    """Serves ``scorer`` on ``host``; port 0 takes a free one, see ``server_address``.

    Raises:
        ConfigError: ``host`` is not loopback and there is no token.
    """

    daemon_threads = True  # a connection that hangs must not hold the process

    def __init__(self, host: str, port: int, *, scorer: Scorer, token: str | None) -> None:
        check_exposure(host, token=token)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)
        self.scorer = scorer
        self.token = token


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
            if not is_authorised(self.headers.get("Authorization"), token=self.server.token):
                raise RequestError("a wrong token, or none", status=401)
            if self.path not in (SCORE_PATH, MODEL_PATH):
                raise RequestError("no such path", status=404)
            if method != ("POST" if self.path == SCORE_PATH else "GET"):
                raise RequestError("another method", status=405)
            if self.path == MODEL_PATH:
                self._send(200, "application/json", json.dumps(self._model()).encode())
                return
            request = read_request(self._body(), limits=self.server.scorer.limits)
        except RequestError as error:
            # the body may be unread, so this connection cannot carry another request
            self.close_connection = True
            self._send_error(error.message, status=error.status)
            return
        try:
            rows = encode_rows(self.server.scorer.score(request), wire=request.wire)
        except Exception:
            self._send_error("the engine failed", status=500)
            raise
        header = encode_header(request.header(model=self.server.scorer.fingerprint))
        self._send(200, CONTENT_TYPE, header, rows)

    def _model(self) -> dict[str, str | int]:
        limits = self.server.scorer.limits
        return {
            "model": self.server.scorer.fingerprint,
            "vocab_size": limits.vocab_size,
            "max_length": limits.max_length,
        }

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
        body = json.dumps({"error": {"message": message}}).encode()
        self._send(status, "application/json", body)

    def _send(self, status: int, content_type: str, *parts: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(sum(map(len, parts))))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        for part in parts:
            self.wfile.write(part)
