"""Servers that sample with one version of the weights: failover, repair and exhaustion.

Requests stand in one line, and whoever is free takes the next, so a server that fails hands its
work to the others by itself. All of it runs inside the caller's thread, within `asyncio.run`.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np

from mopd.errors import SamplerError
from mopd.rollout.push import WeightPush
from mopd.rollout.versions import VersionPolicy
from mopd.serving.http import RefusedError, RetryableError, ServerError
from mopd.serving.sample_server import SampleServer
from mopd.serving.sampling import EngineFacts, Sampled, SampleRequest

T = TypeVar("T")

MAX_PAUSE_S = 2.0
MAX_FOREIGN = 2  # times that somebody else's weights replaced ours


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOptions:
    """When a request is given up.

    Args:
        max_outstanding: requests at a time, per server.
        max_retries: failures in a row that a server may have before it counts as away.
        restart_budget_s: how long all servers may be away.
        patience_s: how long a replica that does not push waits for the one that does.
    """

    max_outstanding: int
    max_retries: int
    restart_budget_s: float
    patience_s: float
    pause_s: float = 0.1


@dataclass(slots=True)
class _Member:
    server: SampleServer
    told: str | None = None  # the version it told last, as long as nothing went wrong since
    failures: int = 0  # in a row
    rests_until: float = 0.0
    had_ours: bool = False
    foreign: int = 0
    repair: asyncio.Lock = field(default_factory=asyncio.Lock)


class Fleet:
    """``check`` looks at what a server is, whenever that is asked; raises what it finds wrong.

    ``events`` counts what went wrong, by reason, whether a retry mended it or not.
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
        self._members = [_Member(server) for server in servers]
        self._policy, self._push, self._check = policy, push, check
        self._options = options
        self._random = random.Random("fleet")
        self._loaded = self._answered = 0.0

    async def start(self) -> int:
        """Waits for all servers; the tokens that every one of them takes.

        Raises:
            SamplerError: one is not there in time, or is not what is needed.
        """
        try:
            facts = await asyncio.gather(*(member.server.start() for member in self._members))
        except ServerError as error:
            raise SamplerError(f"rollout.backend: {error}") from error
        for member, found in zip(self._members, facts, strict=True):
            self._check(member.server, found)
        return min(found.max_length for found in facts)

    async def load(self, *, push: bool) -> None:
        """After the policy has advanced and the weights were taken: brings them everywhere.

        What does not take them now is repaired before it is used.

        Raises:
            SamplerError: a server says that these weights are none of its model.
        """
        self._loaded = asyncio.get_running_loop().time()
        for member in self._members:
            member.told = None
        if push:
            await self._bring(self._members)

    async def _bring(self, members: Sequence[_Member]) -> list[ServerError | None]:
        errors = await self._push.send([member.server for member in members])
        for member, error in zip(members, errors, strict=True):
            if error is None:
                member.told, member.had_ours, member.failures = self._policy.wanted, True, 0
            else:
                self._failed(member, error)
        return errors

    async def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sampled]]:
        """The answers to every request, in order.

        Raises:
            SamplerError: no server answered within the budget, or one refuses us altogether.
        """
        self._answered = asyncio.get_running_loop().time()
        line = deque(range(len(requests)))
        found: dict[int, list[Sampled]] = {}
        changed = asyncio.Condition()

        async def one(member: _Member, number: int) -> list[Sampled]:
            stamp, answers = await member.server.sample(requests[number])
            self._admit(member, requests[number].version, stamp)
            return answers

        async def work(member: _Member, lane: int) -> None:
            while len(found) < len(requests):
                await self._rest(member)
                if not line or (lane and member.failures):
                    async with changed:
                        if len(found) < len(requests):
                            await changed.wait()
                    continue
                number = line.popleft()
                try:
                    found[number] = await self._ask(member, partial(one, member, number))
                except ServerError:
                    line.appendleft(number)
                async with changed:
                    changed.notify_all()

        lanes = range(min(self._options.max_outstanding, len(requests)))
        # every server has its first request before one has its second
        await _together([work(member, lane) for lane in lanes for member in self._members])
        return [found[number] for number in range(len(requests))]

    async def logprobs(self, ids: Sequence[int]) -> np.ndarray:
        """[servers that answer, L - 1] float32, under the wanted version.

        Raises:
            SamplerError: as `sample`.
        """
        self._answered = asyncio.get_running_loop().time()
        wanted = self._policy.asked(self._policy.step)

        async def one(member: _Member) -> np.ndarray:
            stamp, row = await member.server.logprobs(ids)
            self._admit(member, wanted, stamp)
            return row

        async def tried(member: _Member) -> np.ndarray | None:
            await self._rest(member)
            try:
                return await self._ask(member, partial(one, member))
            except ServerError:
                return None

        while True:
            rows = await _together([tried(member) for member in self._members])
            if found := [row for row in rows if row is not None]:
                return np.stack(found)

    async def _ask(self, member: _Member, work: Callable[[], Awaitable[T]]) -> T:
        """``work`` on a server that holds the wanted version.

        Raises:
            ServerError: it was counted, and the server rests.
        """
        try:
            async with member.repair:
                if member.told != self._policy.wanted:
                    await self._mend(member)
            found = await work()
        except ServerError as error:
            self._failed(member, error)
            raise
        member.failures = 0
        self._answered = asyncio.get_running_loop().time()
        return found

    async def _mend(self, member: _Member) -> None:
        """A server that was restarted, or missed an update, gets the weights again."""
        facts = await member.server.facts()
        self._check(member.server, facts)
        if member.had_ours and self._policy.is_foreign(facts.version):
            member.foreign += 1
            if member.foreign > MAX_FOREIGN:
                raise SamplerError(
                    f"rollout.backend.urls: another run keeps loading its own weights into "
                    f"{member.server.url}; give each run its own servers"
                )
        early = asyncio.get_running_loop().time() < self._loaded + self._options.patience_s
        action = self._policy.action(facts.version, patience=early)
        if action == "wait":
            raise RetryableError(
                member.server.url, "version", "has no weights of this step yet from rank 0"
            )
        if action == "push":
            (error,) = await self._push.send([member.server])
            if error is not None:
                raise error
        member.told, member.had_ours = self._policy.wanted, True

    def _admit(self, member: _Member, asked: str, stamp: str | None) -> None:
        if not self._policy.admits(asked, stamp):
            raise RetryableError(
                member.server.url, "version", f"answered with version {stamp}, not {asked}"
            )

    async def _rest(self, member: _Member) -> None:
        pause = member.rests_until - asyncio.get_running_loop().time()
        if pause > 0:
            await asyncio.sleep(pause)

    def _failed(self, member: _Member, error: ServerError) -> None:
        """Raises SamplerError when there is no sense in going on."""
        options, now = self._options, asyncio.get_running_loop().time()
        self.events[error.reason] += 1
        member.told = None
        member.failures += 1
        pause = min(options.pause_s * 2.0 ** min(member.failures - 1, 16), MAX_PAUSE_S)
        member.rests_until = now + pause * self._random.uniform(0.5, 1.5)
        if isinstance(error, RefusedError):
            raise SamplerError(f"rollout.backend: {error}") from error
        if any(each.failures <= options.max_retries for each in self._members):
            return
        since = max(self._answered, self._loaded)
        if isinstance(error, RetryableError) and now - since < options.restart_budget_s:
            return
        raise SamplerError(
            f"rollout.backend: no server answered in {member.failures} tries; the last: {error}; "
            "restart it, or raise rollout.backend.max_retries or restart_budget_s"
        ) from error

    async def close(self) -> None:
        for member in self._members:
            await member.server.close()


async def _together(works: Sequence[Awaitable[T]]) -> list[T]:
    """As gather, but the first error ends the others before it is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
