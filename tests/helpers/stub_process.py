"""The stub server as a process of its own, which can be killed, stopped and started again.

`python -m tests.helpers.stub_process --port N (--vocab-size N | --model DIR --vocab-size N)` with a
pipe as its standard input: when the pipe closes, the server ends.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.runs import ROOT, environment
from tests.helpers.stub_scorers import ModelScorer, PrefixScorer, Scorer
from tests.helpers.stub_server import Fault, StubOptions, StubServer, send_json

WAIT_S = 60.0


class StubProcess:
    """``with StubProcess(vocab_size=n) as stub: stub.url``; one port for its whole life.

    Args:
        model: a directory whose model scores; None: a hash of the prefix does.
        delay_s: how long every request for scores takes at least.
    """

    def __init__(self, *, vocab_size: int, model: Path | None = None, delay_s: float = 0.0) -> None:
        self._words = ["--vocab-size", str(vocab_size), "--delay", str(delay_s)]
        if model is not None:
            self._words += ["--model", str(model)]
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> StubProcess:
        try:
            self.start()
            self.wait()
        except BaseException:
            self.kill()  # a process that stays would fail a later test
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Does not wait; the first start chooses the port."""
        assert self._process is None
        words = [sys.executable, "-m", "tests.helpers.stub_process", "--port", str(self.port)]
        self._process = subprocess.Popen(
            [*words, *self._words],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def wait(self) -> None:
        """Until it listens."""
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith(b"port "), "the stub server did not start"
        self.port = int(line.split()[1])

    def kill(self) -> None:
        """SIGKILL, also where it is stopped; safe to call twice."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait(WAIT_S)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process = None

    def hang(self) -> None:
        """SIGSTOP: connections are accepted and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--delay", type=float, default=0.0)
    arguments = parser.parse_args(argv)
    scorer: Scorer = PrefixScorer(arguments.vocab_size)
    if arguments.model is not None:
        import torch

        torch.set_num_threads(1)
        scorer = ModelScorer(arguments.model, vocab_size=arguments.vocab_size)
    options = StubOptions(fault=lambda number, request: _slow(arguments.delay))
    with StubServer(scorer, options, port=arguments.port) as server:
        print(f"port {server.port}", flush=True)
        sys.stdin.buffer.read()


def _slow(seconds: float) -> Fault:
    async def fault(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> bool:
        await asyncio.sleep(seconds)
        await send_json(writer, reply)
        return True

    return fault


if __name__ == "__main__":
    main(sys.argv[1:])
