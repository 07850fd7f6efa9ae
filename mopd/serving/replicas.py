"""Several servers of one model: the least busy one is asked, a failed one rests for a while."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mopd.errors import TeacherError, TeacherExhausted
from mopd.serving.endpoint import Endpoint
from mopd.serving.http import BadReplyError, RefusedError, RetryableError, ServerError
from mopd.serving.reply import ArrayRows, Entries
from mopd.serving.scoring import ScoredSequence

T = TypeVar("T")

FATAL = ("key", "redirect", "address", "model")  # refusals that no other request would change
MAX_PAUSE_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryOptions:
    """When a request is given up.

    Args:
        max_retries: further tries of one request.
        restart_budget_s: how long all replicas may be away, however many tries that takes.
        entries_per_request: tokens times k of one request, so that a reply stays small.
        pause_s: before the first retry; it doubles, with a jitter, up to `MAX_PAUSE_S`.
    """

    max_outstanding: int
    max_retries: int
    restart_budget_s: float
    entries_per_request: int = 1 << 17
    prompts_per_request: int = 32
    pause_s: float = 0.1


@dataclass(slots=True)
class _State:
    """What is known of a replica now."""

    endpoint: Endpoint
    outstanding: int = 0
    failures: int = 0  # in a row
    rests_until: float = 0.0


class Replicas:
    """Calls block; the requests run concurrently in one background thread.

    ``events`` counts what went wrong, by reason, whether a retry mended it or not.
    """

    def __init__(
        self, name: str, endpoints: Sequence[Endpoint], *, options: RetryOptions, seed: int
    ) -> None:
        self.name = name
        self.events: Counter[str] = Counter()
        self._options = options
        self._states = [_State(endpoint) for endpoint in endpoints]
        self._random = random.Random(f"{seed} {name}")
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Condition()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name=f"teacher {name}", daemon=True
        )
        self._thread.start()

    @property
    def endpoints(self) -> list[Endpoint]:
        return [state.endpoint for state in self._states]

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine on the background loop."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def score(
        self, prompts: Sequence[ScoredSequence], k: int | None
    ) -> list[Entries | ArrayRows | str]:
        """Per prompt, in order: what was said of it, or the reason why there is nothing.

        Raises:
            TeacherExhausted: no replica answered within the budget.
            TeacherError: a server that is not the one it was, or refuses us altogether.
        """
        groups = self._groups(prompts, k)
        found = self.run(self._all(groups, k))
        return [one for group in found for one in group]

    def _groups(
        self, prompts: Sequence[ScoredSequence], k: int | None
    ) -> list[list[ScoredSequence]]:
        groups: list[list[ScoredSequence]] = []
        protocols = [endpoint.protocol for endpoint in self.endpoints]
        single = any(protocol.single for protocol in protocols)
        most = 1 if single else self._options.prompts_per_request
        room = 0
        for prompt in prompts:
            size = protocols[0].entries(prompt, k)
            if not groups or size > room or len(groups[-1]) == most:
                groups.append([])
                room = self._options.entries_per_request
            groups[-1].append(prompt)
            room -= size
        return groups

    async def _all(
        self, groups: list[list[ScoredSequence]], k: int | None
    ) -> list[list[Entries | ArrayRows | str]]:
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(self._group(group, k)) for group in groups]
        except BaseExceptionGroup as errors:
            raise _first(errors) from errors
        return [task.result() for task in running]

    async def _group(
        self, group: list[ScoredSequence], k: int | None
    ) -> list[Entries | ArrayRows | str]:
        """One request; where its reply is no good, one for each prompt, so that one cannot spoil
        the others."""
        try:
            return list(await self._tries(group, k))
        except (BadReplyError, RefusedError) as error:
            if error.reason in FATAL:
                raise TeacherError(f"teachers.{self.name}: {error}") from error
            if len(group) == 1:
                return [error.reason]
        return [one for prompt in group for one in await self._group([prompt], k)]

    async def _tries(self, group: list[ScoredSequence], k: int | None) -> list[Entries | ArrayRows]:
        started, tries = self._loop.time(), 0
        while True:
            state = await self._acquire()
            try:
                found = await state.endpoint.score(group, k)
            except ServerError as error:
                self.events[error.reason] += 1
                tries += 1
                self._failed(state, error)
                spent = tries > self._options.max_retries
                if not isinstance(error, RetryableError):
                    if isinstance(error, RefusedError) or spent:
                        raise
                elif spent and self._loop.time() - started >= self._options.restart_budget_s:
                    raise TeacherExhausted(
                        self.name,
                        f"no replica answered in {tries} tries; the last: {error}; restart it, or "
                        "raise backend.max_retries or restart_budget_s",
                    ) from error
            else:
                state.failures = 0
                return found
            finally:
                state.outstanding -= 1
                async with self._changed:
                    self._changed.notify_all()

    def _failed(self, state: _State, error: ServerError) -> None:
        """Only what says that the server is unwell takes it out of turn."""
        if not isinstance(error, RetryableError):
            return
        state.failures += 1
        pause = min(self._options.pause_s * 2.0 ** min(state.failures - 1, 16), MAX_PAUSE_S)
        state.rests_until = self._loop.time() + pause * self._random.uniform(0.5, 1.5)

    async def _acquire(self) -> _State:
        """The least busy replica that is well; one that failed gets a single request first."""
        async with self._changed:
            while True:
                now = self._loop.time()
                free = [
                    state
                    for state in self._states
                    if state.rests_until <= now
                    and state.outstanding < (1 if state.failures else self._options.max_outstanding)
                ]
                if free:
                    state = min(free, key=lambda state: (state.outstanding, state.failures))
                    state.outstanding += 1
                    return state
                resting = [s.rests_until - now for s in self._states if s.rests_until > now]
                try:
                    async with asyncio.timeout(min(resting, default=None)):
                        await self._changed.wait()
                except TimeoutError:
                    continue

    def close(self) -> None:
        """Ends the thread; safe to call twice."""
        if self._loop.is_closed():
            return
        self.run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5.0)
        self._loop.close()

    async def _close(self) -> None:
        for endpoint in self.endpoints:
            await endpoint.close()


def _first(errors: BaseException) -> BaseException:
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    return errors
