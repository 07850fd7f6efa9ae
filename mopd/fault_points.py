"""Named places where a test may stop, kill or fail the program; inert otherwise.

`MOPD_FAULT_POINT=<name>:<n>` kills the process with SIGKILL the n-th time it comes by.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

Handler = Callable[[str], None]

SAVE_POINTS = (  # the numbered steps of a save, in their order
    "save.part.created",
    "save.shard.started",
    "save.shard.written",
    "save.shard.synced",
    "save.done.written",
    "save.index.written",
    "save.state.written",
    "save.manifest.written",
    "save.part.synced",
    "save.replaced.moved",
    "save.latest.written",
    "save.renamed",
    "save.pruning",
    "save.pruned",
)
STEP_POINTS = (  # of an optimizer step: before it changes a weight, and before it is counted
    "step.gradients.ready",
    "step.weights.changed",
)
FAULT_POINTS = (*SAVE_POINTS, *STEP_POINTS)

_handler: Handler | None = None


def fault_point(name: str) -> None:
    """Calls the handler, where one is installed."""
    if _handler is not None:
        _handler(name)


def install(handler: Handler | None) -> None:
    """Every `fault_point` calls ``handler`` from now on; None makes them inert again."""
    global _handler
    _handler = handler


def killer(name: str, count: int = 1) -> Handler:
    """A handler that ends the process with SIGKILL the ``count``-th time ``name`` comes by.

    Raises:
        ValueError: there is no fault point of this name.
    """
    if name not in FAULT_POINTS:
        raise ValueError(f"no fault point {name!r}; there are {', '.join(FAULT_POINTS)}")
    left = count

    def handle(passed: str) -> None:
        nonlocal left
        if passed == name:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return handle


def _from_environment() -> None:
    if wanted := os.environ.get("MOPD_FAULT_POINT"):
        name, _, count = wanted.partition(":")
        install(killer(name, int(count or 1)))


_from_environment()
