"""A real vLLM server on this CPU, in the environment of `make setup-vllm`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mopd.serving import guard
from mopd.serving.address import free_ports
from mopd.serving.vllm_command import SMALL_CPU, server_environment, server_words
from tests.helpers.missing import missing

ROOT = Path(__file__).resolve().parents[2]
VENV = Path(os.environ.get("MOPD_VLLM_VENV", ROOT / ".venv-vllm"))
MODEL_NAME = "tiny"
MAX_LOGPROBS = 64
MAX_MODEL_LEN = 256  # what the embedded world's models know positions for
START_SECONDS = 240.0
REQUEST_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class VllmServer:
    """A server that has answered a real request. ``seconds`` is what that took."""

    url: str
    model_dir: Path
    log: Path
    process: subprocess.Popen[bytes]  # the guard; the server is its child
    seconds: float

    def request(self, path: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body of a POST of ``body`` as JSON, or of a GET without one."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def kill(self) -> None:
        """SIGKILL to the whole server, as a machine that fails; the guard ends with it."""
        for child in psutil.Process(self.process.pid).children():
            os.killpg(child.pid, signal.SIGKILL)
        self.process.wait(timeout=30)

    def log_tail(self, lines: int = 30) -> str:
        """What the server said last."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def vllm_python() -> Path:
    """The interpreter that has vLLM; skips where there is none, and fails in CI."""
    python = VENV / "bin" / "python"
    if (VENV / ".mopd-setup").is_file() and python.is_file():
        return python
    reason = f"no vLLM in {VENV}: run `make setup-vllm` (Linux x86-64, Python 3.11)"
    missing(reason)


@contextmanager
def run_vllm_server(
    model_dir: Path,
    *,
    log: Path,
    port: int | None = None,
    more: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    sampling: bool = False,
) -> Iterator[VllmServer]:
    """Starts a server and always ends its whole process group, also when the tests die.

    Args:
        port: of an earlier server that this one replaces; None takes a free one.
        sampling: takes weights and samples, as the servers of rollout.backend.
    """
    port = free_ports(1)[0] if port is None else port
    words = server_words(
        model_dir, host="127.0.0.1", port=port, more=more, scoring=True, sampling=sampling
    )
    words += ["--served-model-name", MODEL_NAME, "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", str(MAX_MODEL_LEN), "--max-logprobs", str(MAX_LOGPROBS)]
    # The developer mode opens weight updates: loopback and tests only.
    extra = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(ROOT), **(variables or {})}
    environment = server_environment({**os.environ, **SMALL_CPU, **extra}, token=None)
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-I", guard.__file__, str(vllm_python()), *words],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        server = VllmServer(
            url=f"http://127.0.0.1:{port}",
            model_dir=model_dir,
            log=log,
            process=process,
            seconds=0.0,
        )
        _wait_until_ready(server, deadline=started + START_SECONDS)
        object.__setattr__(server, "seconds", time.monotonic() - started)
        yield server
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Closes the guard's pipe and waits until the group is gone."""
    assert process.stdin is not None
    process.stdin.close()
    process.wait(timeout=30)


def _wait_until_ready(server: VllmServer, *, deadline: float) -> None:
    """Health alone says little: a model with a wrong head size dies on its first request."""
    while True:
        if server.process.poll() is not None:
            raise RuntimeError(f"vLLM's server ended while starting:\n{server.log_tail()}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"vLLM's server is not ready in time:\n{server.log_tail()}")
        try:
            if server.request("/health")[0] == 200:
                break
        except OSError:
            pass
        time.sleep(0.25)
    body = {"model": MODEL_NAME, "prompt": [[5, 6, 7]], "max_tokens": 1, "prompt_logprobs": 1}
    status, reply = server.request("/v1/completions", body)
    if status != 200:
        raise RuntimeError(f"vLLM's first answer is {status}: {reply[:500]!r}")
