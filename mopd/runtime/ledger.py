"""Where every answer of a run went: none is lost, none counts twice."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mopd.errors import MopdError


class Ledger:
    """issued = trained + dropped + in flight, counted on each side by whoever does it.

    Answers are issued by the thread that samples, and settled by the one that trains.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._issued = 0
        self._trained = 0
        self._dropped: Counter[str] = Counter()
        self._open: dict[int, int] = {}  # step -> answers in flight

    def issue(self, step: int, count: int) -> None:
        """``count`` answers of ``step`` are on their way."""
        with self._lock:
            if step in self._open:
                raise MopdError(f"ledger: the answers of step {step} were issued twice")
            self._issued += count
            self._open[step] = count

    def settle(self, step: int, *, trained: int, dropped: Mapping[str, int]) -> None:
        """What became of the answers of ``step``.

        Raises:
            MopdError: they are more or fewer than were issued.
        """
        with self._lock:
            expected, found = self._open.pop(step, 0), trained + sum(dropped.values())
            if expected != found:
                raise MopdError(f"ledger: step {step} issued {expected} answers, {found} came back")
            self._trained += trained
            self._dropped.update({reason: n for reason, n in dropped.items() if n})

    def state(self) -> dict[str, Any]:
        """Counts for a checkpoint.

        Raises:
            MopdError: the sides do not agree.
        """
        with self._lock:
            in_flight, dropped = sum(self._open.values()), sum(self._dropped.values())
            if self._issued != self._trained + dropped + in_flight:
                raise MopdError(
                    f"ledger: {self._issued} answers issued, but {self._trained} trained, "
                    f"{dropped} dropped and {in_flight} in flight"
                )
            return {
                "issued": self._issued,
                "trained": self._trained,
                "dropped": dict(sorted(self._dropped.items())),
                "in_flight": in_flight,
            }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Counts of a checkpoint; what was in flight then is issued again."""
        with self._lock:
            self._issued = state["issued"] - state["in_flight"]
            self._trained = state["trained"]
            self._dropped = Counter(state["dropped"])
            self._open = {}


def added(states: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The ledgers of all replicas as one."""
    dropped: Counter[str] = Counter()
    for state in states:
        dropped.update(state["dropped"])
    total = {key: sum(state[key] for state in states) for key in ("issued", "trained", "in_flight")}
    return {**total, "dropped": dict(sorted(dropped.items()))}
