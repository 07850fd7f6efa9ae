"""A Ray of this host, for one run: started beside it, and gone with it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mopd.config.keys import printable
from mopd.errors import ConfigError
from mopd.serving import guard
from mopd.serving.address import LOOPBACK, free_ports

OBJECT_STORE_BYTES = 100_000_000  # nothing large goes through Ray
START_S = 120.0
LOOK_S = 0.1
CLOSE_S = guard.GRACE_SECONDS + 10.0
TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


class LocalHead:
    """``ray start --head`` in a session of its own, with a token that nobody else knows.

    Ray's own way, `ray.init()` without an address, leaves its processes in the group of the driver:
    a scheduler that tells the group to end would take Ray away before the student has saved.
    """

    def __init__(self, *, num_cpus: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="mopd-ray-"))  # short: sockets lie there
        (self._port,) = free_ports(1)
        self._log = self._folder / "start.log"
        self._before = {name: os.environ.get(name) for name in TOKEN_VARIABLES}
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        self._process = self._start(num_cpus)

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self._port}"

    def _start(self, num_cpus: int) -> subprocess.Popen[bytes]:
        words = ["-m", "ray.scripts.scripts", "start", "--head", "--block"]
        words += ["--include-dashboard=false", "--disable-usage-stats"]
        words += ["--port", str(self._port), "--num-cpus", str(num_cpus)]
        # any free ones: Ray's own range for workers holds some of those that this port is from
        words += ["--min-worker-port", "0", "--max-worker-port", "0"]
        words += ["--temp-dir", str(self._folder)]
        words += ["--object-store-memory", str(OBJECT_STORE_BYTES)]
        with self._log.open("wb") as log:
            return subprocess.Popen(
                # -I: the guard's folder has names of the standard library
                [sys.executable, "-I", guard.__file__, sys.executable, *words],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
                    guard.FOLDER_VARIABLE: str(self._folder),
                },
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it listens.

        Raises:
            ConfigError: it ended, or does not listen in time.
        """
        deadline = time.monotonic() + START_S
        while not self._listens():
            code = self._process.poll()
            if code is not None or time.monotonic() > deadline:
                how = "takes too long" if code is None else f"ended with exit code {code}"
                raise ConfigError(
                    f"launcher: the Ray of this host {how}; it says: {self._last_words()}"
                )
            time.sleep(LOOK_S)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex((LOOPBACK, self._port)) == 0

    def _last_words(self) -> str:
        text = self._log.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return printable(" | ".join(lines[-3:]))[:600] or "nothing"

    def close(self) -> None:
        """Safe to call twice."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        for name, value in self._before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
