"""When a request to servers is given up, and requests side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from mopd.serving.endpoint import Endpoint
from mopd.serving.http import RetryableError

T = TypeVar("T")

LATE_S = 0.5  # of an attempt, beyond the deadlines of its parts


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryOptions:
    """As in the recipe.

    Args:
        max_retries: further tries of one request.
        restart_budget_s: how long all replicas may be away, however many tries that takes.
        entries_per_request: tokens times k of one request, so that a reply stays small.
        pause_s: before the first retry; it doubles, with a jitter, up to a limit.
    """

    max_outstanding: int
    max_retries: int
    restart_budget_s: float
    entries_per_request: int = 1 << 17
    prompts_per_request: int = 32
    pause_s: float = 0.1


@asynccontextmanager
async def attempt(endpoint: Endpoint) -> AsyncIterator[None]:
    """Its end: a request has one deadline, and the check of a new connection another one.

    Raises:
        RetryableError: with the reason timeout.
    """
    limit_s = 2 * endpoint.deadline_s
    try:
        async with asyncio.timeout(limit_s + LATE_S):
            yield
    except TimeoutError as error:
        raise RetryableError(
            endpoint.url,
            "timeout",
            f"no answer within {limit_s:g} s, with the check of a new connection; raise "
            "backend.deadline_s, or look at the server",
        ) from error


async def all_of(works: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
    """The results of all of them, side by side, or the first error."""
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(work()) for work in works]
    except BaseExceptionGroup as errors:
        first = _first(errors)
        raise first from first.__cause__  # its own, not the group that it is a part of
    return [task.result() for task in running]


def _first(errors: BaseException) -> BaseException:
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    return errors
