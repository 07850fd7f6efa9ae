"""Servers that sample with one version of the weights: failover, repair and exhaustion.

Requests stand in one line, and whoever is ready takes the next, so a server that fails hands its
work to the others by itself. A server that is not ready is prepared by a task of its own, which
nobody waits for who has another one. All of it runs in one event loop.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from mopd.errors import SamplerError
from mopd.rollout.member import Member, Reference, now
from mopd.rollout.push import WeightPush
from mopd.rollout.versions import VersionPolicy
from mopd.serving.http import RefusedError, RetryableError, ServerError
from mopd.serving.retry import all_of
from mopd.serving.sample_server import SampleServer
from mopd.serving.sampling import EngineFacts, Sampled, SampleRequest

T = TypeVar("T")

MAX_PAUSE_S = 2.0
WAIT_S = 0.2  # between two looks at whether somebody else has brought the weights
MAX_FOREIGN = 2  # times that somebody else's weights replaced ours


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOptions:
    """When a request is given up.

    Args:
        max_outstanding: requests at a time, per server.
        max_retries: failures in a row that a server may have before it counts as away.
        restart_budget_s: how long all servers may be away.
        patience_s: how long a replica that does not push waits for the one that does.
        tolerance: between the mean log-probabilities of one text by two servers.
    """

    max_outstanding: int
    max_retries: int
    restart_budget_s: float
    patience_s: float
    tolerance: float
    pause_s: float = 0.1


class Fleet:
    """``check`` looks at what a server is, whenever that is asked; raises what it finds wrong.

    A server that failed gets no request until it has told what it is, holds the weights, and
    scores a text as the others do, so one that hangs costs a single deadline and not one every
    step. ``events`` counts what went wrong, by reason, whether a retry mended it or not.
    """

    def __init__(
        self,
        servers: Sequence[SampleServer],
        *,
        policy: VersionPolicy,
        push: WeightPush,
        check: Callable[[SampleServer, EngineFacts], None],
        options: FleetOptions,
    ) -> None:
        self.events: Counter[str] = Counter()
        self.probed: tuple[str, ...] = ()  # who gave the rows of the last `logprobs`
        self._members = [Member(server) for server in servers]
        self._policy, self._push, self._check = policy, push, check
        self._options = options
        self._random = random.Random("fleet")
        self._changed = asyncio.Condition()
        self._loaded = self._answered = 0.0
        self._reference: Reference | None = None
        self._last: ServerError | None = None
        self._broken: Exception | None = None

    async def start(self) -> int:
        """Waits for all servers; the tokens that every one of them takes.

        Raises:
            SamplerError: one is not there in time, or is not what is needed.
        """
        try:
            facts = await all_of([member.server.start for member in self._members])
        except ServerError as error:
            raise SamplerError(f"rollout.backend: {error}") from error
        for member, found in zip(self._members, facts, strict=True):
            self._check(member.server, found)
        return min(found.max_length for found in facts)

    async def load(self, *, push: bool) -> None:
        """After the policy has advanced and the weights were taken: brings them to who is well.

        What does not take them now is prepared before it is used.

        Raises:
            SamplerError: a server says that these weights are none of its model.
        """
        self._loaded = now()
        self._check_hope()
        for member in self._members:
            member.told = None
        if push:
            await self._bring([member for member in self._members if not member.out])
        self._prepare_all()

    async def _bring(self, members: Sequence[Member]) -> None:
        async def present(member: Member) -> Member | None:
            try:
                await member.server.facts()  # a server that hangs shall not cost an update's time
            except ServerError as error:
                self._failed(member, error)
                return None
            return member

        found = [m for m in await all_of([partial(present, m) for m in members]) if m is not None]
        sent = self._push.version
        errors = await self._push.send([member.server for member in found])
        for member, error in zip(found, errors, strict=True):
            if error is None:
                member.told, member.had_ours = sent, True
            else:
                self._failed(member, error)

    async def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sampled]]:
        """The answers to every request, in order.

        Raises:
            SamplerError: no server answered within the budget, or one refuses us altogether.
        """
        self._answered = now()
        self._prepare_all()
        line = deque(range(len(requests)))
        found: dict[int, list[Sampled]] = {}

        async def one(member: Member, number: int) -> list[Sampled]:
            stamp, answers = await member.server.sample(requests[number])
            self._admit(member, requests[number].version, stamp)
            return answers

        async def work(member: Member) -> None:
            def over() -> bool:
                return len(found) == len(requests)

            while not over():
                if not line or not self._is_ready(member):
                    await self._until(lambda: over() or (bool(line) and self._is_ready(member)))
                    continue
                number = line.popleft()
                answers = await self._ask(member, partial(one, member, number))
                if answers is None:
                    line.appendleft(number)
                else:
                    found[number] = answers
                await self._notify()

        lanes = range(min(self._options.max_outstanding, len(requests)))
        # every server has its first request before one has its second
        await all_of([partial(work, member) for _ in lanes for member in self._members])
        return [found[number] for number in range(len(requests))]

    async def logprobs(self, ids: Sequence[int]) -> np.ndarray:
        """[servers that are ready and answer, L - 1] float32, under the wanted version.

        Who becomes ready later must agree with them before it is used.

        Raises:
            SamplerError: as `sample`.
        """
        self._answered = now()
        self._prepare_all()
        wanted = self._policy.asked(self._policy.step)

        async def one(member: Member) -> np.ndarray:
            stamp, row = await member.server.logprobs(ids)
            self._admit(member, wanted, stamp)
            return row

        while True:
            await self._until(lambda: any(map(self._is_ready, self._members)))
            asked = [member for member in self._members if self._is_ready(member)]
            rows = await all_of([partial(self._ask, m, partial(one, m)) for m in asked])
            found = {id(m): row for m, row in zip(asked, rows, strict=True) if row is not None}
            if found:
                break
        self._reference = Reference(wanted, ids, float(np.mean(list(found.values()))))
        for member in self._members:
            member.proved = wanted if id(member) in found else None
        self.probed = tuple(m.server.url for m in self._members if id(m) in found)
        self._prepare_all()
        return np.stack(list(found.values()))

    async def _ask(self, member: Member, work: Callable[[], Awaitable[T]]) -> T | None:
        """``work`` on a server that is ready; None: it failed, and is prepared again."""
        try:
            found = await work()
        except ServerError as error:
            self._failed(member, error)
            self._check_hope()
            self._prepare_all()
            return None
        member.failures = 0
        self._answered = now()
        return found

    def _is_ready(self, member: Member) -> bool:
        wanted = self._policy.wanted
        return not member.out and member.told == wanted and not self._is_doubtful(member)

    def _is_doubtful(self, member: Member) -> bool:
        """Whether there is something to compare it with, and that was not done."""
        wanted, reference = self._policy.wanted, self._reference
        return reference is not None and reference.version == wanted != member.proved

    def _prepare_all(self) -> None:
        for member in self._members:
            idle = member.preparing is None or member.preparing.done()
            if idle and not self._is_ready(member):
                member.preparing = asyncio.create_task(self._prepare(member))

    async def _prepare(self, member: Member) -> None:
        """Until it is ready. Raised in the next call: what nobody can mend."""
        while not self._is_ready(member) and self._broken is None:
            if member.out:
                pause = self._options.pause_s * 2.0 ** min(max(member.failures - 1, 0), 16)
                await asyncio.sleep(min(pause, MAX_PAUSE_S) * self._random.uniform(0.5, 1.5))
            try:
                if await self._mend(member):
                    member.out = False
                else:
                    await asyncio.sleep(WAIT_S)
            except ServerError as error:
                try:
                    self._failed(member, error, again=True)
                except SamplerError as refused:
                    self._broken = refused
            except Exception as error:
                self._broken = error
            await self._notify()

    async def _mend(self, member: Member) -> bool:
        """A server that was restarted, or missed an update, gets the weights and is looked at.

        False: they are to come from another replica, or are not all here yet.
        """
        facts = await member.server.facts()
        self._check(member.server, facts)
        if member.had_ours and self._policy.is_foreign(facts.version):
            member.foreign += 1
            if member.foreign > MAX_FOREIGN:
                raise SamplerError(
                    f"rollout.backend.urls: another run keeps loading its own weights into "
                    f"{member.server.url}; give each run its own servers"
                )
        held, early = facts.version, now() < self._loaded + self._options.patience_s
        action = self._policy.action(held, patience=early)
        taken = self._push.version
        if action == "wait" or (action == "push" and taken != self._policy.wanted):
            return False
        if action == "push":
            held = taken
            (error,) = await self._push.send([member.server])
            if error is not None:
                raise error
        member.told, member.had_ours = held, True
        if held == self._policy.wanted and self._is_doubtful(member):
            await self._prove(member)
        return True

    async def _prove(self, member: Member) -> None:
        """That a server makes of the weights what the others made of them.

        Raises:
            SamplerError: it does not.
        """
        reference, url = self._reference, member.server.url
        assert reference is not None
        stamp, row = await member.server.logprobs(reference.ids)
        self._admit(member, reference.version, stamp)
        mean = float(row.mean())
        if not abs(mean - reference.mean) <= self._options.tolerance:
            raise SamplerError(
                f"rollout.backend: {url} came back and gives a fixed text a mean log-probability "
                f"of {mean:.5f}, where {reference.mean:.5f} was found with the same weights; look "
                "for another model, dtype or quantisation there, or raise "
                "rollout.backend.probe_tolerance"
            )
        member.proved = reference.version

    def _admit(self, member: Member, asked: str, stamp: str | None) -> None:
        if not self._policy.admits(asked, stamp):
            raise RetryableError(
                member.server.url, "version", f"answered with version {stamp}, not {asked}"
            )

    def _failed(self, member: Member, error: ServerError, *, again: bool = False) -> None:
        """Takes a server out; ``again``: while it is prepared.

        Raises:
            SamplerError: it refuses us.
        """
        self.events[error.reason] += 1
        self._last = error
        if again or not member.out:
            member.failures += 1
        member.out, member.told, member.proved = True, None, None
        if isinstance(error, RefusedError):
            raise SamplerError(f"rollout.backend: {error}") from error

    def _check_hope(self) -> None:
        """Raises SamplerError when there is no sense in going on."""
        if self._broken is not None:
            raise self._broken
        options, error = self._options, self._last
        if any(not m.out or m.failures <= options.max_retries for m in self._members):
            return
        since = max(self._answered, self._loaded)
        if isinstance(error, RetryableError) and now() - since < options.restart_budget_s:
            return
        failures = min(member.failures for member in self._members)
        raise SamplerError(
            f"rollout.backend: no server answered in {failures} tries; the last: {error}; "
            "restart it, or raise rollout.backend.max_retries or restart_budget_s"
        ) from error

    async def _until(self, holds: Callable[[], bool]) -> None:
        """Every attempt and every preparation notifies, and each has a deadline."""

        def over() -> bool:
            self._check_hope()
            return holds()

        async with self._changed:
            await self._changed.wait_for(over)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def close(self) -> None:
        """Behind the end of every task."""
        for member in self._members:
            await member.server.close()
