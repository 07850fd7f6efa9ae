"""The student's turns on devices that it shares with engines of its own run.

One rank of each host holds the lease for all ranks there. With a lease for each rank, an engine
could wait between two of them: one rank computes and waits for the other, which is behind the
engine, which is behind the first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mopd.config.pools import STUDENT, student_takes_turns
from mopd.config.schema import RunConfig
from mopd.errors import MopdError
from mopd.runtime.replica import any_rank
from mopd.serving.lease import DeviceLease, lease_path
from mopd.student.away import StudentState
from mopd.student.parallel import TIMEOUT, Topology

# For engines, which end their requests first; the other ranks wait in a collective.
WAIT_S = 0.9 * TIMEOUT.total_seconds()


class StudentTurns:
    """`turn` around whatever computes on the student's devices; nothing without a shared pool.

    The student has the devices from the beginning, so that engines load when it is built:
    `begin` tells what there is to move, and gives them away.
    """

    def __init__(self, config: RunConfig, *, directory: Path) -> None:
        self._shares = student_takes_turns(config)
        self._lease: DeviceLease | None = None
        self._state: StudentState | None = None
        self._topology: Topology | None = None
        self._depth = 0
        if self._shares and os.environ.get("LOCAL_RANK", "0") == "0":
            self._lease = DeviceLease(lease_path(directory, STUDENT), owner=STUDENT)
            self._lease.acquire(wait_s=WAIT_S)

    def begin(self, state: StudentState, topology: Topology) -> None:
        """The student is built. Collective over all ranks."""
        self._state, self._topology = state, topology
        if self._shares:
            self._give_away()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The devices are the student's within, its optimizer's state is there. Collective over
        all ranks, from the main thread; turns may nest.

        Raises:
            MopdError: on every rank, where the devices of one host did not come free.
        """
        if not self._shares or self._depth:
            yield
            return
        self._take()
        self._depth += 1
        try:
            yield
        except BaseException:
            # the other ranks may wait for this one elsewhere: nothing collective any more
            self.close()
            raise
        finally:
            self._depth -= 1
        self._give_away()

    def close(self) -> None:
        """Lets go without a word to the others. Safe at any time."""
        if self._lease is not None:
            self._lease.release()

    def _take(self) -> None:
        assert self._topology is not None and self._state is not None
        problem = None
        try:
            if self._lease is not None:
                self._lease.acquire(wait_s=WAIT_S)
        except Exception as error:
            problem = error
        if any_rank(self._topology, problem is not None):
            raise problem or MopdError("pools.student.shared: another rank has no turn; see there")
        self._state.back()

    def _give_away(self) -> None:
        assert self._topology is not None and self._state is not None
        self._state.away()
        any_rank(self._topology, False)  # a rank that is not here yet still has its memory
        if self._lease is not None:
            self._lease.release()
