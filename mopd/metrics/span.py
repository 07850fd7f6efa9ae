"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mopd.metrics.metric import Metric


class Spans:
    """Seconds per named phase; one instance per thread.

    >>> spans = Spans()
    >>> with spans("rollout"):
    ...     with spans("decode"):
    ...         pass
    >>> sorted(spans.drain())
    ['time/rollout', 'time/rollout/decode']
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block. Inside another span the key is `outer/name`; repeats add up."""
        self._open.append(name)
        key = "/".join(self._open)
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[key] = self._seconds.get(key, 0.0) + self._clock() - start
            self._open.pop()

    def drain(self) -> dict[str, Metric]:
        """Return `time/<phase>` since the last drain (the slowest rank wins) and start anew."""
        drained = {f"time/{key}": Metric.max(seconds) for key, seconds in self._seconds.items()}
        self._seconds = {}
        return drained
