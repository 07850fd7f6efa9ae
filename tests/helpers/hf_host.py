"""Sampling servers around transformers: in a thread, and as processes that can be killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mopd.serving.hf_server import open_server
from mopd.serving.score_server import ScoreServer
from tests.helpers.runs import ROOT, environment

WAIT_S = 60.0
COMMAND = "import sys; from mopd.cli.main import main; sys.exit(main(sys.argv[1:]))"


@contextmanager
def hf_host(
    model_dir: Path, *, port: int = 0, token: str | None = None, host: str = "127.0.0.1"
) -> Iterator[ScoreServer]:
    """``with hf_host(model_dir) as server: server.url``."""
    with open_server(
        model_dir,
        host=host,
        port=port,
        token=token,
        device=torch.device("cpu"),
        samples=True,
        scores=False,
    ) as server:
        server.start()
        yield server
        server.close()


class ServeProcess:
    """``with ServeProcess(model_dir, "--sample") as served: served.url``; one port for its life."""

    def __init__(self, model_dir: Path, *words: str) -> None:
        self._words = ["serve", "--model", str(model_dir), *words]
        self._port = 0
        self.url = ""
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ServeProcess:
        try:
            self.start()
        except BaseException:
            self.kill()  # a process that stays would fail a later test
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def start(self) -> None:
        """Returns when it listens; the first start chooses the port."""
        assert self._process is None
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *self._words, "--port", str(self._port)],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith("mopd serve:"), "the server did not start"
        self.url = line.split()[-1]
        self._port = int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        """SIGKILL; safe to call twice."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait(WAIT_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None
