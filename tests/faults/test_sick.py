"""One sick server among others, and threads that die: what is told, how soon, and who waits."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from mopd.errors import TeacherError, TeacherExhausted
from mopd.serving import loop_thread as loop_thread_module
from mopd.serving import replicas as replicas_module
from mopd.teachers.pool import TeacherPool
from mopd.teachers.remote import RemoteTeacher
from mopd.types import Rollout, TeacherScores
from tests.faults.test_outages import (
    DEADLINE,
    MARGIN_S,
    Bench,
    all_same,
    bench,
    crawl,
    crawl_in_the_head,
    half_close,
    hang,
)
from tests.helpers.stub_server import StubServer, send_json

__all__ = ["bench"]  # a fixture

REPEATS = 3
REQUEST_S = 0.05


@contextmanager
def silent(port: int) -> Iterator[None]:
    """Takes connections and says nothing."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen(64)
        yield


def test_a_server_that_never_answers_is_given_up_at_its_deadline(bench: Bench) -> None:
    server = bench.server()
    teacher = bench.teacher(server, deadline_s=DEADLINE, max_retries=0)
    server.stop()
    with silent(server.port):
        begin = time.monotonic()
        message = rf"no replica answered in 1 tries.*within {DEADLINE:g} s"
        with pytest.raises(TeacherExhausted, match=message):
            teacher.score(bench.rollouts())
        assert time.monotonic() - begin < DEADLINE + MARGIN_S
    assert teacher.events["timeout"] >= 1


def test_requests_give_up_a_silent_replica_together(bench: Bench) -> None:
    """Though they queue for one check of its new connection."""
    silent_one, well = bench.server(), bench.server()
    teacher = bench.teacher(silent_one, well, deadline_s=DEADLINE)
    silent_one.stop()
    with silent(silent_one.port):
        begin = time.monotonic()
        found = teacher.score(bench.rollouts(8))
        assert DEADLINE < time.monotonic() - begin < 3.9 * DEADLINE
    assert all(scores.valid.all() for scores in found)
    assert teacher.events["timeout"] >= 4


def test_a_hung_replica_costs_one_deadline_and_not_one_every_time(bench: Bench) -> None:
    sick, well = bench.server(), bench.server()
    teacher = bench.teacher(sick, well, deadline_s=DEADLINE)
    rollouts = bench.rollouts()
    clean = teacher.score(rollouts)
    sick.options.fault = lambda number, request: hang
    begin = time.monotonic()
    for _ in range(5):
        assert all_same(teacher.score(rollouts), clean)
        time.sleep(0.2)  # its rest is over long before
    assert DEADLINE < time.monotonic() - begin < 5 * DEADLINE  # and not one every time
    sick.options.fault = lambda number, request: None
    before, end = len(sick.requests), time.monotonic() + 15.0
    while len(sick.requests) < before + 6 and time.monotonic() < end:
        assert all_same(teacher.score(rollouts), clean)
    assert len(sick.requests) >= before + 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"seed": 7}, "away from before"), ({"model": "other"}, "served 'stub' before")],
)
def test_a_replica_that_comes_back_as_another_ends_the_run(
    bench: Bench, changes: dict[str, Any], message: str
) -> None:
    """Found while it is probed, and told where the next answer waits."""
    server = bench.server()
    teacher = bench.teacher(server, restart_budget_s=30.0, max_retries=1)
    server.stop()
    timer = threading.Timer(0.5, lambda: bench.server(port=server.port, **changes))
    timer.start()
    begin = time.monotonic()
    with pytest.raises(TeacherError, match=message) as caught:
        teacher.score(bench.rollouts())
    timer.join()
    assert not isinstance(caught.value, TeacherExhausted)
    assert time.monotonic() - begin < 10.0


def test_replicas_take_turns(bench: Bench) -> None:
    servers = [bench.server() for _ in range(3)]
    teacher = bench.teacher(*servers)
    for _ in servers:  # every connection was checked once
        teacher.score(bench.rollouts(1))
    before = [len(server.requests) for server in servers]
    for _ in range(6):
        teacher.score(bench.rollouts(1))
    asked = [len(s.requests) - b for s, b in zip(servers, before, strict=True)]
    assert asked == [2, 2, 2]


async def slow(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> bool:
    await asyncio.sleep(REQUEST_S)
    await send_json(writer, reply)
    return True


class Timed:
    """A remote teacher with a stop-watch."""

    concurrent = True

    def __init__(self, teacher: RemoteTeacher, done: Callable[[], None]) -> None:
        self.name, self.tokenizer = teacher.name, teacher.tokenizer
        self.accuracy, self.close = teacher.accuracy, teacher.close
        self.seconds: list[float] = []
        self._teacher, self._done = teacher, done

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        begin = time.monotonic()
        try:
            return self._teacher.score(rollouts)
        finally:
            self.seconds.append(time.monotonic() - begin)
            self._done()


def fall_ill(server: StubServer, fault: Callable | None) -> None:
    server.options.fault = lambda number, request: fault


@pytest.mark.parametrize("fault", [hang, crawl, crawl_in_the_head, half_close])
def test_the_other_teachers_do_not_wait_for_a_sick_one(
    bench: Bench, fault: Callable, record_property: Callable[[str, object], None]
) -> None:
    """Seconds of a teacher beside a sick one over those without a neighbour."""
    servers = bench.server(), bench.server()
    fall_ill(servers[1], slow)
    teacher = bench.teacher(
        servers[0], deadline_s=DEADLINE, restart_budget_s=60.0, max_retries=3, pause_s=0.1
    )
    timed = Timed(bench.teacher(servers[1]), lambda: fall_ill(servers[0], None))
    pool = TeacherPool({"sort": teacher, "other": timed})
    rollouts = [
        replace(r, prompt=replace(r.prompt, teachers=("sort", "other"))) for r in bench.rollouts(24)
    ]
    lonely = [replace(r, prompt=replace(r.prompt, teachers=("other",))) for r in rollouts]
    clean = pool.score(rollouts)
    for _ in range(REPEATS):
        pool.score(lonely)
        fall_ill(servers[0], fault)
        found = pool.score(rollouts)
        for one, two in zip(found, clean, strict=True):
            assert all_same(list(one.values()), list(two.values()))
    alone, beside = timed.seconds[1::2], timed.seconds[2::2]
    assert len(alone) == len(beside) == REPEATS
    ratio = min(beside) / min(alone)
    record_property("seconds_ratio", ratio)
    print(json.dumps({"fault": fault.__name__, "ratio": ratio, "alone": min(alone)}))
    assert teacher.events["timeout"] + teacher.events["reset"] >= REPEATS
    assert max(beside) < 15.0  # the sick one may take a minute


def loop_of(teacher: RemoteTeacher) -> asyncio.AbstractEventLoop:
    return teacher._replicas._thread.loop


def test_a_dead_thread_is_told_soon_with_its_cause(bench: Bench) -> None:
    server = bench.server()
    teacher = bench.teacher(server, deadline_s=60.0)
    teacher.score(bench.rollouts(1))
    fall_ill(server, hang)
    timer = threading.Timer(0.3, loop_of(teacher).call_soon_threadsafe, [sys.exit, 3])
    timer.start()
    begin = time.monotonic()
    with pytest.raises(TeacherError, match=r"teachers\.sort: .*SystemExit \(3\)") as caught:
        teacher.score(bench.rollouts())
    assert isinstance(caught.value.__cause__, SystemExit)
    with pytest.raises(TeacherError, match="SystemExit"):
        teacher.score(bench.rollouts())
    teacher.close()
    assert time.monotonic() - begin < 20.0
    assert loop_of(teacher).is_closed()


def test_closing_ends_whoever_waits(bench: Bench) -> None:
    server = bench.server()
    teacher = bench.teacher(server, deadline_s=60.0)
    fall_ill(server, hang)
    timer = threading.Timer(0.3, teacher.close)
    timer.start()
    begin = time.monotonic()
    with pytest.raises(TeacherError, match=r"teachers\.sort: closed while it was asked"):
        teacher.score(bench.rollouts())
    timer.join()
    assert time.monotonic() - begin < 20.0
    assert not any(t.name == "teacher sort" for t in threading.enumerate())
    assert not asyncio.all_tasks(loop_of(teacher))


def test_closing_ends_the_probes_of_a_dead_replica(bench: Bench) -> None:
    dead, well = bench.server(), bench.server()
    teacher = bench.teacher(dead, well)
    dead.stop()
    teacher.score(bench.rollouts())
    assert asyncio.all_tasks(loop_of(teacher))
    teacher.close()
    assert not asyncio.all_tasks(loop_of(teacher))


def test_no_wait_is_for_ever_even_where_deadlines_fail(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something keeps the thread of the requests: no deadline in it can fire."""
    monkeypatch.setattr(replicas_module, "SLACK_S", -40.7)
    monkeypatch.setattr(replicas_module, "MAX_AFTER_S", 0)
    monkeypatch.setattr(replicas_module, "MAX_PAUSE_S", 0.01)
    monkeypatch.setattr(loop_thread_module, "CLOSE_S", 0.1)
    server = bench.server()
    teacher = bench.teacher(server, deadline_s=5.0, max_retries=0)
    free = threading.Event()
    loop_of(teacher).call_soon_threadsafe(free.wait, 60.0)
    begin = time.monotonic()
    with pytest.raises(TeacherError, match=r"teachers\.sort: not one request ended within 1 s"):
        teacher.score(bench.rollouts())
    assert time.monotonic() - begin < 10.0
    free.set()


def test_a_slow_teacher_that_moves_is_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer in all than the patience for a single request."""
    monkeypatch.setattr(replicas_module, "SLACK_S", -46.0)
    monkeypatch.setattr(replicas_module, "MAX_AFTER_S", 0)
    monkeypatch.setattr(replicas_module, "MAX_PAUSE_S", 0.01)
    server = bench.server()
    teacher = bench.teacher(server, deadline_s=6.0, max_retries=0)
    patience_s = teacher._replicas._patience_s
    assert 3.9 < patience_s < 4.1

    async def lazy(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> bool:
        await asyncio.sleep(0.9)
        await send_json(writer, reply)
        return True

    clean = teacher.score(bench.rollouts(20))
    fall_ill(server, lazy)
    begin = time.monotonic()
    assert all_same(teacher.score(bench.rollouts(20)), clean)
    assert time.monotonic() - begin > patience_s
