"""Who has a shared pool's devices: one holder at a time among the processes of a host.

The lease is a file that its holder has locked with `flock`. The kernel gives the lock back when the
last process that has it ends, however it ends: no holder's death loses a lease. Whoever waits
has a file of its own in the folder beside it, locked as well: so the holder sees that it is wanted,
the waiting come in the order in which they asked, and one that died is passed over.

A pool has one lease for all of its devices. With one for each device, an engine over two of them
and a student with a rank on both could each hold what the other one needs. For the same reason
nobody asks for a lease while it holds another one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mopd.errors import MopdError

LEASE_VARIABLE = "MOPD_LEASE"  # where a server finds the file of the lease that it takes turns on
OWNER_VARIABLE = "MOPD_LEASE_OWNER"  # and its own name, for messages
FIRST_POLL_S, LAST_POLL_S = 0.002, 0.05  # between two looks; the pause doubles

_numbers = itertools.count()


class LeaseTimeout(MopdError, TimeoutError):
    """The devices did not come free in time; the message names who had them last."""


class DeviceLease:
    """A lease, for one thread at a time; other objects of this process are other owners.

    Args:
        path: the lock file. Its folder must be of this host alone, see `lease_path`.
        owner: for messages, as in teachers.math.
    """

    def __init__(self, path: Path, *, owner: str) -> None:
        self.path = path
        self.owner = owner
        self._queue = path.with_name(f"{path.name}.queue")
        self._held: int | None = None  # the file that is locked

    @property
    def is_held(self) -> bool:
        return self._held is not None

    def acquire(
        self, *, wait_s: float | None, is_given_up: Callable[[], bool] = lambda: False
    ) -> bool:
        """Waits for its turn behind all who asked before; False: it was given up meanwhile.

        Args:
            wait_s: at most; None: whoever started this process watches the time.
            is_given_up: nobody needs the lease any more.
        Raises:
            LeaseTimeout: the time is over.
        """
        assert self._held is None, "the lease is held already"
        self._queue.mkdir(mode=0o700, parents=True, exist_ok=True)
        began, pause = time.monotonic(), FIRST_POLL_S
        with self._place() as place:
            while not is_given_up():
                if not self._is_behind(place) and self._lock():
                    return True
                if wait_s is not None and time.monotonic() - began > wait_s:
                    raise LeaseTimeout(
                        f"{self.owner}: waited {wait_s:g} s for {self.path}, which "
                        f"{self.last_holder()} had last; look at that process"
                    )
                time.sleep(pause)
                pause = min(2 * pause, LAST_POLL_S)
        return False

    def is_wanted(self) -> bool:
        """Whether somebody alive waits for it."""
        return self._is_behind(None)

    def release(self) -> None:
        """Safe to call twice."""
        if self._held is None:
            return
        # closing alone would not do: a child that was forked meanwhile has the file open too
        fcntl.flock(self._held, fcntl.LOCK_UN)
        os.close(self._held)
        self._held = None

    def last_holder(self) -> str:
        """Who holds it, or held it last."""
        with contextlib.suppress(OSError):
            return self.path.read_text(encoding="utf-8", errors="replace")[:200] or "nobody"
        return "nobody"

    def _lock(self) -> bool:
        file = _opened(self.path)
        if not _locked(file):
            os.close(file)
            return False
        os.ftruncate(file, 0)
        os.pwrite(file, f"{self.owner} (process {os.getpid()})".encode(), 0)
        self._held = file
        return True

    @contextlib.contextmanager
    def _place(self) -> Iterator[str]:
        """A place at the queue's end: a file whose name is older than those that come later."""
        # the monotonic clock is the same for all processes of a host
        name = f"{time.monotonic_ns():020d}-{os.getpid()}-{next(_numbers)}"
        hidden, shown = self._queue / f".{name}", self._queue / name
        file = _opened(hidden)
        try:
            assert _locked(file)
            hidden.rename(shown)  # nobody sees it unlocked, and takes it for one that died
            yield name
        finally:
            for path in (hidden, shown):
                path.unlink(missing_ok=True)
            os.close(file)

    def _is_behind(self, place: str | None) -> bool:
        """Whether somebody alive is in the queue, before ``place`` where that is given."""
        for name in sorted(os.listdir(self._queue)) if self._queue.is_dir() else []:
            if place is not None and name >= place:
                return False
            if not name.startswith(".") and self._is_alive(self._queue / name):
                return True
        return False

    def _is_alive(self, path: Path) -> bool:
        """Whether the owner of a place still waits; else the place is removed."""
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            # shared: two who look at a dead one do not take each other for its owner
            if not _locked(file, fcntl.LOCK_SH):
                return True
            path.unlink(missing_ok=True)
            return False
        finally:
            os.close(file)


def lease_of(environment: Mapping[str, str] = os.environ) -> DeviceLease | None:
    """The lease that whoever started this process has named; None: its devices are its own."""
    path = environment.get(LEASE_VARIABLE)
    owner = environment.get(OWNER_VARIABLE, "an engine")
    return None if not path else DeviceLease(Path(path), owner=owner)


def lease_environment(path: Path, *, owner: str) -> dict[str, str]:
    """What `lease_of` reads in the process of a server."""
    return {LEASE_VARIABLE: str(path), OWNER_VARIABLE: owner}


def lease_path(run: Path, pool: str) -> Path:
    """The lease of a run's pool on this host, in a folder of this user alone.

    It is never inside the run, whose folder several hosts may see: each has devices of its own,
    and not every network's file system can lock.

    Raises:
        MopdError: the folder belongs to somebody else.
    """
    folder = Path(tempfile.gettempdir()) / f"mopd-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or folder.is_symlink():
        raise MopdError(f"{folder}: others may write there; remove it, or set TMPDIR")
    key = hashlib.sha256(f"{run.absolute()}\n{pool}".encode()).hexdigest()[:16]
    return folder / f"{key}.lease"


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _locked(file: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
