"""Functions in a process that is attached to a Ray cluster, and clusters to attach it to.

The pytest process stays apart: Ray reads its token when it is imported, and whoever is attached
stays so.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mopd.serving import guard
from mopd.serving.address import free_ports, is_free

# what LocalHead sets and a process inherits
AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED")

Call = Callable[..., Any]


@contextmanager
def attached(address: str, environment: Mapping[str, str] | None = None) -> Iterator[Call]:
    """``call(function, *arguments)`` runs a top-level function in such a process."""
    context = multiprocessing.get_context("spawn")
    given = environment or {k: os.environ[k] for k in AUTHENTICATION if k in os.environ}
    with ProcessPoolExecutor(1, context, initializer=_set, initargs=(dict(given),)) as pool:
        pool.submit(_join, address).result(timeout=120)
        try:
            yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=120)
        finally:
            pool.submit(_leave).result(timeout=60)


def _set(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def _join(address: str) -> None:
    from mopd.runtime.ray.cluster import join

    join(address)


def _leave() -> None:
    import ray

    ray.shutdown()


@contextmanager
def head(
    *words: str, resources: Mapping[str, float] | None = None, token: bool = True
) -> Iterator[tuple[str, dict[str, str]]]:
    """Another cluster on this host: its address, and the environment that joins it."""
    folder = Path(tempfile.mkdtemp(prefix="mopd-ray-"))  # short: sockets lie there
    (port,) = free_ports(1)
    environment = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    if token:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    start = ["-m", "ray.scripts.scripts", "start", "--head", "--block", "--port", str(port)]
    start += ["--include-dashboard=false", "--disable-usage-stats", "--num-cpus", "8"]
    start += ["--min-worker-port", "0", "--max-worker-port", "0"]
    start += ["--temp-dir", str(folder), "--object-store-memory", "100000000"]
    start += ["--resources", json.dumps(resources or {}), *words]
    process = subprocess.Popen(
        [sys.executable, "-I", guard.__file__, sys.executable, *start],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"},
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        deadline = time.monotonic() + 60
        while is_free("127.0.0.1", port):
            assert process.poll() is None and time.monotonic() < deadline, "it does not start"
            time.sleep(0.1)
        yield f"127.0.0.1:{port}", environment
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)
