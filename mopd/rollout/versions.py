"""What a trainer makes of the versions that its engines tell: pure decisions, no requests."""

from __future__ import annotations

from typing import Literal

from mopd.errors import StaleWeightsError
from mopd.serving.versions import make_version

# use it, give it the weights, or leave it to the replica of this trainer that does
Action = Literal["use", "push", "wait"]


class VersionPolicy:
    """The version that this trainer wants everywhere, and whose answers it takes.

    Args:
        session: random, the same on all replicas of one trainer, another one after a restart.
        pushes: whether this replica brings the weights; the others wait for it at first.
    """

    def __init__(self, session: str, *, pushes: bool = True) -> None:
        self._session = session
        self._pushes = pushes
        self.step = -1

    @property
    def wanted(self) -> str | None:
        """The version of the newest weights; None before the first."""
        return None if self.step < 0 else make_version(self._session, self.step)

    def advance(self, step: int) -> str:
        """Wants the weights of ``step`` from now on.

        Raises:
            StaleWeightsError: they are not newer.
        """
        if step <= self.step:
            raise StaleWeightsError(f"version {step} is not newer than {self.step}")
        self.step = step
        return make_version(self._session, step)

    def asked(self, step: int) -> str:
        """The version to sample from.

        Raises:
            StaleWeightsError: ``step`` is not what was loaded last.
        """
        wanted = self.wanted
        if wanted is None or step != self.step:
            raise StaleWeightsError(f"asked for version {step}, have {self.step}")
        return wanted

    def action(self, told: str | None, *, patience: bool) -> Action:
        """For an engine that tells the version ``told``.

        A restarted engine has none; another session's is a former run's. ``patience``: it is too
        early for a replica that does not push to think that nobody will.
        """
        if told is not None and told == self.wanted:
            return "use"
        return "push" if self._pushes or not patience else "wait"

    def is_foreign(self, told: str | None) -> bool:
        """Whether somebody else's weights are in an engine."""
        return told is not None and not told.startswith(f"{self._session}/")

    @staticmethod
    def admits(asked: str, stamp: str | None) -> bool:
        """Whether an answer that was asked of one version came, as a whole, from it."""
        return stamp is not None and stamp == asked
