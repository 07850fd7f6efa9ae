"""Several servers of one model: the least busy one is asked, a failed one is probed until well."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from mopd.errors import TeacherError, TeacherExhausted
from mopd.serving.drafts import Draft
from mopd.serving.endpoint import Endpoint
from mopd.serving.http import (
    MAX_AFTER_S,
    BadReplyError,
    RefusedError,
    RetryableError,
    ServerError,
)
from mopd.serving.loop_thread import LoopEnded, LoopThread
from mopd.serving.reply import ArrayRows, Entries
from mopd.serving.retry import LATE_S, RetryOptions, all_of, attempt
from mopd.serving.scoring import ScoredSequence

T = TypeVar("T")

BUSY = "busy"
FATAL = ("key", "redirect", "address", "model")  # refusals that no other request would change
MAX_PAUSE_S = 2.0
MAX_LATENCIES = 10_000  # of requests, between two that read them
LONGER = 1.25  # than a server asked to be left alone, at most: not all come back together
SLACK_S = 30.0  # of waits that end by themselves earlier
START_REQUESTS = 64  # of the checks of one server, at most


@dataclass(slots=True)
class _State:
    """What is known of a replica now."""

    endpoint: Endpoint
    outstanding: int = 0
    failures: int = 0  # in a row, several at a time count once; 0: it is well
    doubted: bool = False  # it refused a prompt, and its probe has not ended since
    cleared: int = 0  # refusals in doubt that the next probe found a well server behind
    turn: int = 0  # of its last request
    reviving: asyncio.Task[None] | None = None

    @property
    def is_well(self) -> bool:
        return not (self.failures or self.doubted)


class Replicas:
    """Calls block; the requests run concurrently in one background thread.

    A replica that failed or refused gets no request until it has passed ``endpoint.probe``, so one
    that hangs costs a single deadline and not one every step. A refused prompt is asked again: at
    fault is a prompt that was refused twice, by at least one replica that is well. ``events``
    counts what went wrong, by reason, whether a retry mended it or not; ``latencies`` are
    the seconds of requests that were answered, waits and retries included.
    """

    def __init__(
        self, name: str, endpoints: Sequence[Endpoint], *, options: RetryOptions, seed: int
    ) -> None:
        self.name = name
        self.events: Counter[str] = Counter()
        self.latencies: deque[float] = deque(maxlen=MAX_LATENCIES)
        self._options = options
        self._states = [_State(endpoint) for endpoint in endpoints]
        self._random = random.Random(f"{seed} {name}")
        self._changed = asyncio.Condition()
        self._answered = self._moved = time.monotonic()
        self._turn = 0
        self._last: ServerError | None = None
        self._broken: Exception | None = None
        self._thread = LoopThread(f"teacher {name}", release=self._release)

    @property
    def endpoints(self) -> list[Endpoint]:
        return [state.endpoint for state in self._states]

    def run(self, work: Coroutine[Any, Any, T], *, patience_s: float | None = None) -> T:
        """The result of a coroutine on the background loop.

        Args:
            patience_s: how long nothing may be answered; None: as long as all servers may start.
        Raises:
            TeacherError: the patience or the thread is at its end, or `close` was called.
        """
        if patience_s is None:
            each = [e.start_s + START_REQUESTS * e.deadline_s for e in self.endpoints]
            patience_s = sum(each) + SLACK_S
        self._moved = time.monotonic()

        def watch() -> None:
            if time.monotonic() - self._moved > patience_s:
                raise TeacherError(
                    f"teachers.{self.name}: not one request ended within {patience_s:.0f} s, "
                    "though each has a deadline; look at the load of this machine"
                )

        try:
            return self._thread.run(work, watch=watch)
        except LoopEnded:
            raise self._gone() from self._thread.ended

    def _gone(self) -> TeacherError:
        ended = self._thread.ended
        if ended is None:
            return TeacherError(f"teachers.{self.name}: closed while it was asked")
        return TeacherError(
            f"teachers.{self.name}: the thread of its requests ended with "
            f"{type(ended).__name__} ({ended}); the same command continues from the "
            "last checkpoint"
        )

    @property
    def _patience_s(self) -> float:
        """Longer than any request that ends by its own rules."""
        tries = self._options.max_retries + 2
        deadline_s = max(endpoint.deadline_s for endpoint in self.endpoints)
        # a probe may come before every attempt
        each = 2 * (2 * deadline_s + LATE_S) + 1.5 * MAX_PAUSE_S + LONGER * MAX_AFTER_S
        return tries * each + self._options.restart_budget_s + SLACK_S

    def score(
        self, prompts: Sequence[ScoredSequence], k: int | None
    ) -> list[Entries | ArrayRows | str]:
        """Per prompt, in order: what was said of it, or the reason why there is nothing.

        Raises:
            TeacherExhausted: no replica answered within the budget.
            TeacherError: a server that is not the one it was, or refuses us altogether.
        """
        groups = self._groups(prompts, k)
        works = [partial(self._group, group, k) for group in groups]
        found = self.run(all_of(works), patience_s=self._patience_s)
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

    def write(self, drafts: Sequence[Draft]) -> list[list[tuple[np.ndarray, bool]]]:
        """Per draft and prompt, in order: the ids of its text, and whether its turn ended.

        Raises:
            TeacherError: as `score`, and where a draft is refused.
        """

        async def one(draft: Draft) -> list[tuple[np.ndarray, bool]]:
            try:
                return await self._tries(lambda endpoint: endpoint.write(draft))
            except (BadReplyError, RefusedError) as error:
                raise TeacherError(f"teachers.{self.name}: {error}") from error

        works = [partial(one, draft) for draft in drafts]
        return self.run(all_of(works), patience_s=self._patience_s)

    async def _group(
        self, group: list[ScoredSequence], k: int | None
    ) -> list[Entries | ArrayRows | str]:
        """One request; where its reply is no good, one for each prompt, so that one cannot spoil
        the others."""
        try:
            return list(await self._tries(lambda endpoint: endpoint.score(group, k)))
        except (BadReplyError, RefusedError) as error:
            if error.reason in FATAL:
                raise TeacherError(f"teachers.{self.name}: {error}") from error
            if len(group) == 1:
                return [error.reason]
        return [one for prompt in group for one in await self._group([prompt], k)]

    async def _tries(self, ask: Callable[[Endpoint], Awaitable[T]]) -> T:
        began, tries, busy = time.monotonic(), 0, 0
        refusals: list[tuple[_State, int]] = []  # by whom, and its `cleared` before
        try:
            while True:
                state = await self._acquire(began)
                try:
                    async with attempt(state.endpoint):
                        found = await ask(state.endpoint)
                except ServerError as error:
                    failure, known = error, _is_witness(state, refusals)
                    if _is_doubtful(error):
                        refusals.append((state, state.cleared))
                    else:
                        tries += 1
                    self._failed(state, error, known=known)
                    self._check_over(error, tries, began)
                else:
                    self._answered = time.monotonic()
                    self.latencies.append(self._answered - began)
                    return found
                finally:
                    state.outstanding -= 1
                    await self._notify()
                if _is_doubtful(failure):
                    if len(refusals) > 1 and await self._is_at_fault(refusals):
                        raise failure
                elif failure.reason == BUSY:
                    busy += 1
                    await asyncio.sleep(self._pause(busy, failure))
        finally:
            self._moved = time.monotonic()

    def _check_over(self, error: ServerError, tries: int, began: float) -> None:
        """Raises what ends a request: ``error`` itself, or TeacherExhausted."""
        spent = tries > self._options.max_retries
        if isinstance(error, RetryableError):
            if spent and self._is_over(began):
                raise self._exhausted(tries) from error
        elif not _is_doubtful(error) and (spent or isinstance(error, RefusedError)):
            raise error

    async def _is_at_fault(self, refusals: Sequence[tuple[_State, int]]) -> bool:
        """Whether one that refused the prompt is well, by its next probe.

        False: all that refused it were away; it is to be asked again.
        """
        async with self._changed:
            while True:
                if self._broken is not None:
                    raise self._broken
                if any(_is_witness(state, refusals) for state, _ in refusals):
                    return True
                if not any(state.doubted for state, _ in refusals):
                    return False
                await self._changed.wait()

    def _is_over(self, since: float) -> bool:
        return time.monotonic() - since >= self._options.restart_budget_s

    def _exhausted(self, tries: int) -> TeacherExhausted:
        return TeacherExhausted(
            self.name,
            f"no replica answered in {tries} tries; the last: {self._last}; restart it, or "
            "raise backend.max_retries or restart_budget_s",
        )

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _failed(self, state: _State, error: ServerError, *, known: bool) -> None:
        """Only what says that the server may be unwell takes it out of turn; not a refusal of what
        it is ``known`` to refuse when it is well."""
        self.events[error.reason] += 1
        self._last = error
        was_well = state.is_well
        if isinstance(error, RetryableError) and error.reason != BUSY:
            state.failures = max(state.failures, 1)
        elif _is_doubtful(error) and not known and was_well:
            state.doubted = True
        if was_well and not state.is_well:
            state.reviving = asyncio.create_task(self._revive(state))

    def _pause(self, failures: int, error: ServerError | None = None) -> float:
        """Seconds, longer with every failure, and as long as the server asks for."""
        pause = min(self._options.pause_s * 2.0 ** min(max(failures - 1, 0), 16), MAX_PAUSE_S)
        after_s = error.after_s if isinstance(error, RetryableError) else 0.0
        return max(
            pause * self._random.uniform(0.5, 1.5), after_s * self._random.uniform(1.0, LONGER)
        )

    async def _revive(self, state: _State) -> None:
        """Probes a replica out of turn until it is well; no rollout waits for its answer."""
        while not state.is_well and self._broken is None:
            await asyncio.sleep(self._pause(state.failures))
            try:
                async with attempt(state.endpoint):
                    await state.endpoint.verify()
                state.cleared += state.doubted
                state.failures, state.doubted = 0, False
            except ServerError as error:
                self.events[error.reason] += 1
                self._last = error
                state.failures, state.doubted = state.failures + 1, False
                if error.reason in FATAL:
                    self._broken = TeacherError(f"teachers.{self.name}: {error}")
            except Exception as error:  # raised where the next request waits
                self._broken = error
            await self._notify()

    async def _acquire(self, began: float) -> _State:
        """The least busy replica that is well.

        Raises:
            TeacherExhausted: all of them have been away for too long.
        """
        async with self._changed:
            while True:
                if self._broken is not None:
                    raise self._broken
                failures = min(state.failures for state in self._states)
                if failures > self._options.max_retries and self._is_over(
                    max(began, self._answered)
                ):
                    raise self._exhausted(failures)
                most = self._options.max_outstanding
                free = [s for s in self._states if s.is_well and s.outstanding < most]
                if free:
                    state = min(free, key=lambda state: (state.outstanding, state.turn))
                    state.outstanding += 1
                    self._turn = state.turn = self._turn + 1
                    return state
                # every attempt and every probe notifies, and each has a deadline
                await self._changed.wait()

    def close(self) -> None:
        """Ends the thread and what waits for it; safe to call twice."""
        self._thread.close()

    async def _release(self) -> None:
        for endpoint in self.endpoints:
            await endpoint.close()


def _is_doubtful(error: ServerError) -> bool:
    """A refusal: of this prompt, or by a server that is not itself (404 on every path)."""
    return isinstance(error, RefusedError) and error.reason not in FATAL


def _is_witness(state: _State, refusals: Sequence[tuple[_State, int]]) -> bool:
    """Whether it refused the prompt while it was well."""
    return any(one is state and state.cleared > cleared for one, cleared in refusals)
