"""Sampling ahead of training: the answers of the next steps while this one is trained."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mopd.runtime.gather import Gathered, Gatherer


class Ahead:
    """`take` gives steps in order; with ``lag`` > 0 a thread works up to that many steps ahead.

    Step t is sampled under version ``max(first, t - lag)``, never another: a run does not depend on
    how fast anybody is. So `before_push` waits until nobody needs the present version any more.
    """

    def __init__(self, gatherer: Gatherer, *, lag: int, num_steps: int) -> None:
        self._gatherer = gatherer
        self._lag = lag
        self._num_steps = num_steps
        self._first = 0
        self._version = -1
        self._sampled = 0  # steps before this one have their answers
        self._ready: deque[Gathered] = deque()
        self._error: BaseException | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._working = threading.Lock()  # held by the thread for a step, and by `paused`
        self._thread: threading.Thread | None = None

    def start(self, step: int) -> None:
        """From ``step`` on; its version must have been pushed."""
        self._first = self._sampled = step
        if self._lag:
            self._thread = threading.Thread(target=self._work, name="rollouts", daemon=True)
            self._thread.start()

    def take(self, step: int) -> Gathered:
        """Raises what went wrong in the thread."""
        if not self._lag:
            return self._gatherer.score(step, self._gatherer.sample(step, version=step))
        with self._changed:
            self._wait(lambda: bool(self._ready))
            found = self._ready.popleft()
        if found.step != step:
            raise ValueError(f"asked for step {step}, the next is {found.step}")
        return found

    def before_push(self, version: int) -> None:
        """Waits until all answers of older versions are sampled (the thread scores them still)."""
        if self._thread is None:
            return
        needed = min(version + self._lag, self._num_steps)
        with self._changed:
            self._wait(lambda: self._sampled >= needed)

    def after_push(self, version: int) -> None:
        with self._changed:
            self._version = version
            self._changed.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The thread asks neither sampler nor teachers within; a step that it began ends first."""
        with self._working:
            yield

    def close(self) -> None:
        """Ends the thread after the step that it samples or scores, if that takes no 5 s."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def _wait(self, done: Callable[[], bool]) -> None:
        """For the thread; with the condition held."""
        while not done():
            if self._error is not None:
                raise self._error
            self._changed.wait(timeout=1.0)

    def _work(self) -> None:
        try:
            for step in range(self._first, self._num_steps):
                version = max(self._first, step - self._lag)
                with self._changed:
                    while self._version < version and not self._closing:
                        self._changed.wait(timeout=1.0)
                    if self._closing:
                        return
                with self._working:
                    rollouts = self._gatherer.sample(step, version=version)
                    with self._changed:
                        self._sampled = step + 1
                        self._changed.notify_all()
                    gathered = self._gatherer.score(step, rollouts)
                with self._changed:
                    self._ready.append(gathered)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
