"""Which weights an engine holds, and which of them an answer came from. No torch, no vllm.

A version is the text ``<session>/<step>``. The session is drawn at random by the trainer, so that a
run that goes on from an older step, or another trainer, never takes old weights for its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_VERSION = re.compile(r"[0-9a-z]{8,64}/[0-9]{1,12}")


def make_version(session: str, step: int) -> str:
    """The name of the weights before optimizer step ``step``."""
    version = f"{session}/{step}"
    if not is_version(version):
        raise ValueError(f"{version!r} is no version: a session has 8 to 64 of [0-9a-z]")
    return version


def is_version(text: object) -> bool:
    """Whether ``text`` is what `make_version` writes; safe as a relative path then."""
    return isinstance(text, str) and _VERSION.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Ticket:
    """What was served when a request came in."""

    version: str | None
    changes: int


class ServedVersion:
    """The version of one engine: none until a whole update has landed.

    `stamp` gives a version only to what began and ended under it: whatever overlaps an update, also
    one that failed or that brought the same weights again, has none.
    """

    def __init__(self) -> None:
        self.current: str | None = None
        self._changes = 0

    def begin(self) -> None:
        """From here on the engine's weights may be anything."""
        self.current = None
        self._changes += 1

    def finish(self, version: str) -> None:
        """The engine holds all weights of ``version``, and nothing of earlier ones is cached."""
        self.current = version

    def ticket(self) -> Ticket:
        """Taken before a request reaches the engine."""
        return Ticket(self.current, self._changes)

    def stamp(self, ticket: Ticket) -> str | None:
        """The version of an answer that is complete now; None: not from one version."""
        return self.current if ticket == self.ticket() else None
