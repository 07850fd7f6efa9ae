"""A vLLM engine that takes turns on its devices, by vLLM's sleep mode.

Asleep (level 1) the weights are in host memory and the cache is dropped. Level 2 would drop the
weights as well: an answer before the next update would come from nowhere. On CPUs sleeping is a
pause, and no memory moves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from mopd.serving.lease import DeviceLease, LeaseTimeout, lease_of
from mopd.serving.scoring import RequestError
from mopd.serving.turns import Turns
from mopd.serving.vllm_leased import take_held

LEVEL = 1
MOVE_S = 600.0  # for weights on their way
TEXT_PATHS = ("/tokenize", "/detokenize")  # which need no device


class EngineTurns:
    """Turns of the engine of this server; none where its devices are its own."""

    def __init__(self) -> None:
        self._lease = take_held() or lease_of()
        self._turns: Turns | None = None

    def attend(self, scope: dict[str, Any]) -> None:
        """Called with whatever the server is asked: from the first time on the lease, under which
        the engine was loaded, goes to others that wait."""
        if self._lease is None or self._turns is not None:
            return
        engine = getattr(getattr(scope.get("app"), "state", None), "engine_client", None)
        if engine is not None:
            self._turns = _turns(engine, self._lease, asyncio.get_running_loop())

    @asynccontextmanager
    async def turn(self, scope: dict[str, Any]) -> AsyncIterator[None]:
        """The engine is awake within, where the request needs it.

        Raises:
            RequestError: 429, the devices did not come free in time.
        """
        if self._turns is None or not _needs_engine(scope):
            yield
            return
        turn = self._turns.aturn()
        try:
            await turn.__aenter__()
        except LeaseTimeout as error:
            raise RequestError(str(error), status=429) from error
        try:
            yield
        finally:
            await turn.__aexit__(None, None, None)

    def close(self) -> None:
        """Lets go, after the requests that run."""
        if self._turns is not None:
            self._turns.close()


def _turns(engine: Any, lease: DeviceLease, loop: asyncio.AbstractEventLoop) -> Turns:
    def wait_for(work: Coroutine[Any, Any, Any]) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(MOVE_S)

    return Turns(
        lease,
        load=lambda: wait_for(engine.wake_up()),
        release=lambda: wait_for(engine.sleep(level=LEVEL, mode="wait")),
    )


def _needs_engine(scope: dict[str, Any]) -> bool:
    """Whatever vLLM serves beside facts about itself: those are asked for by GET."""
    if scope["type"] == "http":
        return scope["method"] == "POST" and scope["path"] not in TEXT_PATHS
    return scope["type"] == "websocket"
