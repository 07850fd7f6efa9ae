"""What a fleet knows of each of its servers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from mopd.serving.sample_server import SampleServer


@dataclass(frozen=True, slots=True)
class Reference:
    """What servers made of a text under ``version``, as it was told to the trainer."""

    version: str
    ids: Sequence[int]
    mean: float


@dataclass(slots=True)
class Member:
    """One server."""

    server: SampleServer
    told: str | None = None  # the version it told last, as long as nothing went wrong since
    proved: str | None = None  # the version whose `Reference` it agrees with
    out: bool = False  # it failed, and was not prepared again since
    failures: int = 0  # since its last answer; several at a time count once
    had_ours: bool = False
    foreign: int = 0  # times that somebody else's weights were there
    preparing: asyncio.Task[None] | None = None


def now() -> float:
    """The running loop's clock."""
    return asyncio.get_running_loop().time()
