"""A process that has a lease, or a whole scoring server that takes turns; seen from outside.

`python -m tests.helpers.leased_engine hold LEASE OWNER` says `held` once it is the holder, and
keeps the lease until its standard input closes. `serve LEASE OWNER MODEL QUANTUM LOG` says its
port; every move of its weights is a line of LOG: what, and the monotonic time before and after.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mopd.serving.lease import DeviceLease
from tests.helpers.runs import ROOT, environment

WAIT_S = 60.0


class LeasedProcess:
    """``with LeasedProcess("hold", path, "a") as one: one.wait()``; killed at the end."""

    def __init__(self, *words: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.leased_engine", *map(str, words)],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> LeasedProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def wait(self) -> str:
        """What it says when it is ready."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode().strip()
        assert line, "it ended"
        return line

    def let_go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(WAIT_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)


def intervals(log: Path) -> list[tuple[float, float]]:
    """(before its weights came, after they left), the last one perhaps without an end."""
    found: list[tuple[float, float]] = []
    begin = None
    for line in log.read_text().splitlines():
        what, before, after = line.split()
        if what == "load":
            assert begin is None, "it loads twice"
            begin = float(before)
        else:
            assert begin is not None, "it leaves before it came"
            found.append((begin, float(after)))
            begin = None
    return found if begin is None else [*found, (begin, float("inf"))]


def _serve(lease: DeviceLease, model: Path, quantum_s: float, log: Path) -> None:
    import torch

    from mopd.serving import hf_turns, turns
    from mopd.serving.hf_scorer import TransformersScorer
    from mopd.serving.offload import Offloaded
    from mopd.serving.score_server import ScoreServer

    torch.set_num_threads(1)

    def logged(what: str, move: Callable[[Offloaded], None]) -> Callable[[Offloaded], None]:
        def moved(weights: Offloaded) -> None:
            before = time.monotonic()
            move(weights)
            with log.open("a") as file:
                file.write(f"{what} {before} {time.monotonic()}\n")

        return moved

    first = Offloaded.unload
    Offloaded.load = logged("load", Offloaded.load)  # type: ignore[method-assign]

    def turns_of(*args: object, **keys: object) -> turns.Turns:
        Offloaded.unload = logged("unload", first)  # type: ignore[method-assign]
        return turns.Turns(*args, quantum_s=quantum_s, **keys)  # type: ignore[arg-type]

    hf_turns.Turns = turns_of  # type: ignore[assignment,misc]
    scorer = TransformersScorer(model, device=torch.device("cpu"), lease=lease)
    with ScoreServer("127.0.0.1", 0, scorer=scorer, token=None) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


def main(argv: list[str]) -> None:
    what, path, owner, *more = argv
    lease = DeviceLease(Path(path), owner=owner)
    if what == "hold":
        lease.acquire(wait_s=WAIT_S)
        print("held", flush=True)
        sys.stdin.buffer.read()
        lease.release()
    else:
        model, quantum_s, log = more
        _serve(lease, Path(model), float(quantum_s), Path(log))


if __name__ == "__main__":
    main(sys.argv[1:])
