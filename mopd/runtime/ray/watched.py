"""An actor and what is asked of it: one question at a time, so that a silent one is noticed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError

from mopd.errors import MopdError

NewsT = TypeVar("NewsT")


class Gone(MopdError):
    """The process of an actor is dead, or does not answer any more."""


class Watched(Generic[NewsT]):
    """``work`` is the call that lasts as long as the actor should."""

    def __init__(self, name: str, actor: ActorHandle, *, pause_s: float, silent_s: float) -> None:
        self.name = name
        self.actor = actor
        self.work: Any = None
        self._is_over = False
        self._pause_s = pause_s
        self._silent_s = silent_s
        self._question: Any = None
        self._asked = 0.0

    def begin(self, work: Any) -> None:
        """Once."""
        self.work = work

    @property
    def waiting(self) -> list[Any]:
        """What becomes ready when there is something to look at."""
        # what ended is ready for ever
        found = () if self._is_over else (self.work, self._question)
        return [one for one in found if one is not None]

    def look(self) -> NewsT | None:
        """The answer to the last question, when it is there; asks the next one.

        Raises:
            Gone: it is dead, cannot be reached, or was silent for too long.
        """
        now = time.monotonic()
        if self._question is None:
            if now - self._asked >= self._pause_s:
                self._question, self._asked = self.actor.news.remote(), now
            return None
        if not is_done(self._question):
            if now - self._asked > self._silent_s:
                self.kill()
                raise Gone(f"{self.name} was silent for {self._silent_s:g} s")
            return None
        question, self._question = self._question, None
        return value_of(question, name=self.name)

    def last_look(self, *, timeout_s: float) -> list[NewsT]:
        """The answers to the question that is under way, which holds what was said before it, and
        to one more.

        Raises:
            Gone: it is dead.
            TimeoutError: no answer within ``timeout_s``.
        """
        asked = [self._question] if self._question is not None else []
        self._question = None
        asked.append(self.actor.news.remote())
        return [value_of(one, name=self.name, timeout_s=timeout_s) for one in asked]

    def result(self) -> Any:
        """What the work returned, None before it begins and while it goes on.

        Raises:
            Gone: it ended with the process.
        """
        if self.work is None or not is_done(self.work):
            return None
        self._is_over = True
        return value_of(self.work, name=self.name)

    def kill(self) -> None:
        """At once, without a word."""
        with contextlib.suppress(RayActorError, ValueError):
            ray.kill(self.actor, no_restart=True)


def is_done(reference: Any) -> bool:
    return bool(ray.wait([reference], timeout=0)[0])


def value_of(reference: Any, *, name: str, timeout_s: float | None = None) -> Any:
    """What a call gave.

    Raises:
        Gone: the actor is dead.
        TimeoutError: no answer within ``timeout_s``.
    """
    try:
        return ray.get(reference, timeout=timeout_s)
    except ActorUnavailableError as error:
        raise Gone(f"{name} cannot be reached") from error
    except RayActorError as error:
        raise Gone(f"{name} died") from error


def wait_for_news(watched: Sequence[Watched[Any]], *, seconds: float) -> None:
    """Until there is something to look at, or so long."""
    waiting = [reference for one in watched for reference in one.waiting]
    if waiting:
        ray.wait(waiting, num_returns=1, timeout=seconds)
    else:
        time.sleep(seconds)
