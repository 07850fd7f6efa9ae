"""vLLM's servers as child processes: started, watched, started again, ended with the trainer.

No torch here, so that an actor that only keeps a server may import it.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mopd.config.keys import printable
from mopd.errors import ConfigError
from mopd.serving import guard
from mopd.serving.address import LOOPBACK, base_url, is_free

PACKAGE = Path(__file__).resolve().parents[1]
PYTHON_VARIABLE = "MOPD_VLLM_PYTHON"
LOOK_S = 0.25  # between two looks at a server
HEALTH_S = 2.0  # for one answer of a server that is starting
RESTART_PAUSE_S = 1.0
CLOSE_S = guard.GRACE_SECONDS + 20.0
PORT_S = guard.GRACE_SECONDS + 20.0  # for whoever had the port before to end
TAIL_BYTES = 1 << 16  # of a log, for its last lines
SHOWN = 240  # characters of one line of a log in our message
# What vLLM writes before a message: who, how bad, when and where.
LOG_PREFIX = re.compile(r"^(\([^)]*\)\s*)?([A-Z]+ \d\d-\d\d [\d:]+ \[[^\]]*\]\s*)?")
LOG_ERROR = re.compile(
    r"(^|\s)[\w.]*(Error|Exception): |\berror[:,] |\b(Killed|No space left|out of memory)\b"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One server: ``owner`` is who uses it in the recipe, as in teachers.math.

    ``words`` and ``host``, ``port`` must say the same: where it listens, and is asked for its
    health.
    """

    owner: str
    words: tuple[str, ...]  # the interpreter first
    environment: Mapping[str, str] = field(repr=False)  # the key is in it
    port: int
    log: Path
    max_restarts: int
    host: str = LOOPBACK

    @property
    def key(self) -> str:
        """The section of the recipe that says how it is started."""
        return f"{self.owner}.backend"


class ServerProcess:
    """A thread starts it once its port is free, watches it, tells news by ``report`` and restarts
    it. The port of a server that was killed with its starter is free when its guard has ended it.

    A server that was healthy before is started again on its port, ``max_restarts`` times. One that
    never was is not: ``failure`` then says why, and stays set.
    """

    def __init__(self, launch: Launch, report: Callable[[str], None]) -> None:
        self.launch = launch
        self.failure: str | None = None
        self.restarts = 0
        self._report = report
        self._healthy = threading.Event()  # once, at any time
        self._closing = threading.Event()
        self._lock = threading.Lock()  # no start once it is being closed
        self._began = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        launch.log.write_bytes(b"")
        report(f"starting vLLM for {launch.owner} at {self.url}, log in {launch.log}")
        self._thread = threading.Thread(target=self._watch, name=f"watch {self.url}", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return base_url(self.launch.host, self.launch.port)

    @property
    def was_healthy(self) -> bool:
        """It answered once; it may be away by now."""
        return self._healthy.is_set()

    @property
    def seconds(self) -> float:
        """Since it was started, or started again."""
        return time.monotonic() - self._began

    def log_tail(self, lines: int = 3) -> str:
        """The last lines of its log that tell of an error, else the last ones, in one line."""
        with self.launch.log.open("rb") as file:
            file.seek(max(0, self.launch.log.stat().st_size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
        said = [LOG_PREFIX.sub("", line).strip() for line in text.splitlines()]
        said = list(dict.fromkeys(line for line in said if line))
        chosen = [line for line in said if LOG_ERROR.search(line)] or said
        return " | ".join(printable(line)[:SHOWN] for line in chosen[-lines:]) or "nothing"

    def end(self) -> None:
        """Asks it to end; `close` waits for that."""
        self._closing.set()
        with self._lock:
            if self._process is not None:
                _close_pipe(self._process)

    def close(self) -> None:
        """Its whole process group is gone afterwards. Safe to call twice."""
        self.end()
        self._thread.join(timeout=CLOSE_S)
        if self._process is None:
            return
        try:
            self._process.wait(timeout=CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=CLOSE_S)

    def _start(self) -> bool:
        """Starts it, or a new one in its place. False: it is being closed, or the port is not free
        in time."""
        launch = self.launch
        deadline = time.monotonic() + PORT_S
        while not is_free(launch.host, launch.port):
            if self._closing.wait(LOOK_S):
                return False
            if time.monotonic() > deadline:
                self._fail(
                    f"{launch.key}: its vLLM server cannot listen at {self.url}, where another "
                    "process does, or which is no address of this host; end that process"
                )
                return False
        with self._lock:
            if self._closing.is_set():
                return False
            if self._process is not None:
                _close_pipe(self._process)
            self._process = self._spawn()
        return True

    def _spawn(self) -> subprocess.Popen[bytes]:
        self._began = time.monotonic()
        with self.launch.log.open("ab") as log:
            return subprocess.Popen(
                # -I: this folder has names of the standard library
                [sys.executable, "-I", guard.__file__, *self.launch.words],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.launch.environment),
                start_new_session=True,
            )

    def _watch(self) -> None:
        try:
            self._restart_while_allowed()
        except OSError as error:
            self._fail(f"{self.launch.key}: its vLLM server cannot be started: {error}")

    def _fail(self, failure: str) -> None:
        """Told before it can be seen: who sees it may end the process."""
        self._report(failure)
        self.failure = failure

    def _restart_while_allowed(self) -> None:
        while self._start() and (code := self._until_it_ends()) is not None:
            key, owner, log = self.launch.key, self.launch.owner, self.launch.log
            if not self.was_healthy:
                self.failure = (
                    f"{key}: its vLLM server ended while it was starting (exit code {code}); its "
                    f"log says: {self.log_tail()}; see {log}, correct {key}.server"
                )
                return
            died = f"vLLM for {owner} at {self.url} died (exit code {code}, log in {log})"
            if self.restarts == self.launch.max_restarts:
                self._fail(
                    f"{died} and stays away after {self.restarts} restarts; see "
                    f"{key}.server.max_restarts"
                )
                return
            self.restarts += 1
            self._report(
                f"{died}: starting it again, {self.restarts} of {self.launch.max_restarts}"
            )
            self._closing.wait(RESTART_PAUSE_S)

    def _until_it_ends(self) -> int | None:
        """The exit code of the present process; None when it is being closed."""
        process, is_healthy = self._process, False
        assert process is not None
        while not self._closing.wait(LOOK_S):
            if (code := process.poll()) is not None:
                return code
            if not is_healthy and (is_healthy := answers(self.launch.host, self.launch.port)):
                self._report(f"vLLM for {self.launch.owner} is ready after {self.seconds:.0f} s")
                self._healthy.set()
        return None


def _close_pipe(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()


def answers(host: str, port: int) -> bool:
    """Whether a server's ``/health`` is 200, or asks for a key."""
    connection = http.client.HTTPConnection(host, port, timeout=HEALTH_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status in (200, 401, 403)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def close_all(processes: Sequence[ServerProcess]) -> None:
    """They end side by side."""
    for process in processes:
        process.end()
    for process in processes:
        process.close()


def find_python(key: str, given: str | None, environment: Mapping[str, str]) -> str:
    """The interpreter that has vLLM: the recipe's, the environment's, this one, or the project's.

    Raises:
        ConfigError: there is none, or the one that was named is not there.
    """
    named = {f"{key}.server.python": given, PYTHON_VARIABLE: environment.get(PYTHON_VARIABLE)}
    for name, python in named.items():
        if python and shutil.which(python) is None:
            raise ConfigError(f"{name}: {printable(python)} is no interpreter; correct it")
        if python:
            return os.path.abspath(shutil.which(python) or python)
    spec = importlib.util.find_spec("vllm")
    if spec is not None and spec.origin is not None:  # a mere folder of that name has none
        return sys.executable
    beside = PACKAGE.parent / ".venv-vllm" / "bin" / "python"
    if beside.is_file():
        return str(beside)
    raise ConfigError(
        f"{key}.urls: is empty, and there is no vLLM to start; run `make setup-vllm` or "
        f"`pip install 'mopd[vllm]'`, or name an interpreter that has it: {key}.server.python"
    )


def importable(directory: Path) -> Path:
    """A folder with nothing but mopd in it, by a link.

    The folder that mopd lies in may be a site-packages, whose torch would hide the server's own.
    """
    directory.mkdir(parents=True, exist_ok=True)
    link, fresh = directory / PACKAGE.name, directory / f".{PACKAGE.name}-{os.getpid()}"
    if not link.is_symlink() or link.readlink() != PACKAGE:
        fresh.symlink_to(PACKAGE, target_is_directory=True)
        os.replace(fresh, link)
    return directory.absolute()
