"""One holder at a time, in the order of asking, whoever dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from mopd.errors import MopdError
from mopd.serving.lease import (
    DeviceLease,
    LeaseTimeout,
    lease_environment,
    lease_of,
    lease_path,
)
from tests.helpers.leased_engine import LeasedProcess
from tests.helpers.small_server import wait_until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pool.lease"


def lease(path: Path, owner: str = "teachers.a") -> DeviceLease:
    return DeviceLease(path, owner=owner)


def test_a_lease_has_one_holder(path: Path) -> None:
    one, two = lease(path), lease(path, "teachers.b")
    assert one.acquire(wait_s=0.0) and one.is_held
    with pytest.raises(LeaseTimeout, match=r"teachers\.b: waited 0\.05 s .*teachers\.a"):
        two.acquire(wait_s=0.05)
    assert not two.is_held
    one.release()
    one.release()
    assert two.acquire(wait_s=0.0)
    two.release()


def test_the_holder_learns_that_others_wait_and_that_they_went(path: Path) -> None:
    one, two = lease(path), lease(path)
    one.acquire(wait_s=0.0)
    assert not one.is_wanted()
    given_up = threading.Event()
    found: list[bool] = []
    waiting = threading.Thread(
        target=lambda: found.append(two.acquire(wait_s=30.0, is_given_up=given_up.is_set))
    )
    waiting.start()
    wait_until(one.is_wanted)
    given_up.set()
    waiting.join()
    assert found == [False] and not one.is_wanted() and not two.is_held
    one.release()


def test_those_who_wait_come_in_the_order_of_asking(path: Path) -> None:
    holder = lease(path)
    holder.acquire(wait_s=0.0)
    order: list[int] = []

    def take(number: int) -> None:
        own = lease(path, str(number))
        own.acquire(wait_s=30.0)
        order.append(number)
        own.release()

    threads = []
    for number in range(5):
        threads.append(threading.Thread(target=take, args=(number,)))
        threads[-1].start()
        # a hidden name is that of a place which is not taken yet
        wait_until(lambda n=number: len([*Path(f"{path}.queue").glob("[0-9]*")]) == n + 1)
    holder.release()
    holder.acquire(wait_s=30.0)  # behind all of them, though it is first at the door
    order.append(99)
    holder.release()
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4, 99]


def test_a_holder_that_is_killed_leaves_the_lease_to_the_next(path: Path) -> None:
    own = lease(path, "teachers.b")
    with LeasedProcess("hold", path, "teachers.a") as other:
        assert other.wait() == "held"
        # one that does not even run any more still has what is on the devices
        other.process.send_signal(signal.SIGSTOP)
        with pytest.raises(LeaseTimeout, match=rf"teachers\.a \(process {other.process.pid}\)"):
            own.acquire(wait_s=0.2)
        other.kill()
        assert own.acquire(wait_s=5.0)
    own.release()


def test_a_waiter_that_is_killed_holds_nobody_up(path: Path) -> None:
    own, last = lease(path), lease(path)
    own.acquire(wait_s=0.0)
    with LeasedProcess("hold", path, "teachers.a") as other:
        wait_until(own.is_wanted)
        other.kill()
    wait_until(lambda: not own.is_wanted())
    own.release()
    assert last.acquire(wait_s=5.0)
    assert os.listdir(f"{path}.queue") == []
    last.release()


def test_a_child_that_was_forked_does_not_keep_it(path: Path) -> None:
    own, other = lease(path), lease(path)
    own.acquire(wait_s=0.0)
    ready, end = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        os.write(ready[1], b"x")
        os.read(end[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    own.release()
    try:
        assert other.acquire(wait_s=5.0)
    finally:
        os.write(end[1], b"x")
        os.waitpid(child, 0)
        for file in (*ready, *end):
            os.close(file)
    other.release()


def test_a_server_finds_its_lease_in_its_environment(path: Path) -> None:
    assert lease_of({}) is None
    found = lease_of(lease_environment(path, owner="teachers.a"))
    assert found is not None and (found.path, found.owner) == (path, "teachers.a")


def test_a_pool_of_a_run_has_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    runs = [(tmp_path / run, pool) for run in ("a", "b") for pool in ("x", "y")]
    found = {lease_path(*one) for one in runs}
    assert len(found) == 4 and {lease_path(*one) for one in runs} == found
    folder = next(iter(found)).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(MopdError, match="others may write there"):
        lease_path(tmp_path, "x")


def test_waiting_is_bounded_behind_a_queue(path: Path) -> None:
    holder, first, second = lease(path), lease(path), lease(path)
    holder.acquire(wait_s=0.0)
    thread = threading.Thread(target=lambda: first.acquire(wait_s=30.0))
    thread.start()
    wait_until(holder.is_wanted)
    began = time.monotonic()
    with pytest.raises(LeaseTimeout):
        second.acquire(wait_s=0.1)
    assert time.monotonic() - began >= 0.1
    holder.release()
    thread.join()
    assert first.is_held
    first.release()
