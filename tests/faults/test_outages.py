"""Servers that hang, crawl, vanish, come back, or come back as another model."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from mopd.demo import World
from mopd.errors import TeacherError, TeacherExhausted
from mopd.serving import replicas as replicas_module
from mopd.teachers.remote import RemoteTeacher
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Rollout, TeacherScores
from tests.faults.test_fuzz import same
from tests.helpers.stub_scorers import PrefixScorer
from tests.helpers.stub_server import StubOptions, StubServer, send_json
from tests.helpers.teachers import make_rollout_of, remote_teacher

DEADLINE = 2.0  # where a server is to miss it; longer than the pauses of a busy machine
PATIENT_S = 20.0  # where none is
MARGIN_S = 4.0  # above a deadline, for a machine that does other things too


class Bench:
    """Servers of one scorer, and a teacher in front of them."""

    def __init__(self, world: World, stack: ExitStack) -> None:
        self.student = ChatTokenizer.load(world.student)
        self.tokenizer = ChatTokenizer.load(world.teachers["sort"])
        self.scorer = PrefixScorer(self.tokenizer.vocabulary.size)
        self._stack = stack

    def server(self, *, port: int = 0, seed: int = 0, **options: Any) -> StubServer:
        scorer = PrefixScorer(self.tokenizer.vocabulary.size, seed=seed)
        return self._stack.enter_context(StubServer(scorer, StubOptions(**options), port=port))

    def teacher(
        self, *servers: StubServer, deadline_s: float = PATIENT_S, **retry: Any
    ) -> RemoteTeacher:
        found = remote_teacher(
            [server.url for server in servers],
            tokenizer=self.tokenizer,
            student=self.student,
            endpoint={"deadline_s": deadline_s},
            retry={"prompts_per_request": 1} | retry,
        )
        self._stack.callback(found.close)
        return found

    def rollouts(self, number: int = 6) -> list[Rollout]:
        return [make_rollout_of(self.student, b"bo %d ka" % i) for i in range(number)]


@pytest.fixture
def bench(tiny_world: World) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(tiny_world, stack)


async def hang(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> bool:
    await asyncio.sleep(3600)
    return False


async def crawl(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> bool:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.2)


async def crawl_in_the_head(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> bool:
    for letter in b"HTTP/1.1 200 OK and so on for a long time":
        writer.write(bytes([letter]))
        await writer.drain()
        await asyncio.sleep(0.2)
    return False


async def half_close(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> bool:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")
    writer.write_eof()
    await asyncio.sleep(3600)
    return False


def all_same(one: list[TeacherScores], two: list[TeacherScores]) -> bool:
    return all(same(a, b) for a, b in zip(one, two, strict=True))


def canary(teacher: RemoteTeacher) -> list[int]:
    return teacher._canary.prompts[0].tolist()


@pytest.mark.parametrize("fault", [hang, crawl, crawl_in_the_head, half_close])
def test_a_sick_sole_server_is_given_up_at_its_deadline(
    bench: Bench, fault: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas_module, "MAX_PAUSE_S", 3600.0)
    server = bench.server()
    # no probe of the sick one comes before its events are counted
    teacher = bench.teacher(server, deadline_s=DEADLINE, max_retries=0, pause_s=3600.0)
    teacher.score(bench.rollouts(1))
    server.options.fault = lambda number, request: fault
    begin = time.monotonic()
    with pytest.raises(TeacherExhausted, match=r"teachers\.sort: no replica") as caught:
        teacher.score(bench.rollouts(1))
    assert time.monotonic() - begin < DEADLINE + MARGIN_S
    assert caught.value.teacher == "sort"
    assert set(teacher.events) <= {"timeout", "reset"} and teacher.events.total() == 1


def test_a_sick_replica_costs_time_and_nothing_else(bench: Bench) -> None:
    sick, well = bench.server(), bench.server()
    teacher = bench.teacher(sick, well, deadline_s=DEADLINE)
    rollouts = bench.rollouts()
    clean = teacher.score(rollouts)
    assert sick.requests and well.requests
    sick.options.fault = lambda number, request: hang
    assert all_same(teacher.score(rollouts), clean)
    assert teacher.events["timeout"] >= 1


def test_a_killed_replica_is_replaced_by_the_other_and_asked_again_later(bench: Bench) -> None:
    one, two = bench.server(), bench.server()
    teacher = bench.teacher(one, two, restart_budget_s=20.0, max_retries=4)
    rollouts = bench.rollouts()
    clean = teacher.score(rollouts)
    two.stop()
    for _ in range(3):
        assert all_same(teacher.score(rollouts), clean)
    back = bench.server(port=two.port)
    end = time.monotonic() + 15.0
    while len(back.requests) < 4 and time.monotonic() < end:
        assert all_same(teacher.score(rollouts), clean)
    # nothing that it says is believed before it has scored the fixed text
    assert [canary(teacher)] in [request["prompt"] for request in back.requests]


def test_a_sole_server_may_restart_within_the_budget(bench: Bench) -> None:
    server = bench.server()
    teacher = bench.teacher(server, restart_budget_s=20.0, max_retries=1)
    rollouts = bench.rollouts(2)
    clean = teacher.score(rollouts)
    server.stop()

    async def restart() -> None:
        await asyncio.sleep(0.7)
        bench.server(port=server.port)

    begin = time.monotonic()
    loop_thread = threading.Thread(target=lambda: asyncio.run(restart()))
    loop_thread.start()
    assert all_same(teacher.score(rollouts), clean)
    loop_thread.join()
    assert 0.6 < time.monotonic() - begin < 10.0


def test_without_a_restart_the_run_ends_with_the_teachers_name(bench: Bench) -> None:
    server = bench.server()
    teacher = bench.teacher(server, restart_budget_s=0.5, max_retries=1)
    server.stop()
    with pytest.raises(TeacherExhausted, match=r"teachers\.sort.*connect.*raise backend"):
        teacher.score(bench.rollouts(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 7}, "away from before.*same model"),
        ({"model": "other"}, "served 'stub' before|no model|other"),
    ],
)
def test_another_model_behind_the_same_address_is_seen_at_once(
    bench: Bench, changes: dict[str, Any], message: str
) -> None:
    server = bench.server()
    teacher = bench.teacher(server, restart_budget_s=10.0)
    teacher.score(bench.rollouts())
    server.stop()
    bench.server(port=server.port, **changes)
    with pytest.raises(TeacherError, match=message) as caught:
        teacher.score(bench.rollouts())
    assert not isinstance(caught.value, TeacherExhausted)


def test_requests_run_side_by_side_and_no_more_than_allowed(bench: Bench) -> None:
    async def slow(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> bool:
        await asyncio.sleep(0.2)
        await send_json(writer, reply)
        return True

    one, two = bench.server(), bench.server()
    teacher = bench.teacher(one, two)
    for server in (one, two):
        server.options.fault = lambda number, request: slow
    found = teacher.score(bench.rollouts(24))
    assert [len(s.valid) > 0 for s in found] == [True] * 24
    assert one.busiest <= 4 and two.busiest <= 4
    assert one.busiest >= 2 and two.busiest >= 2
    share = len(one.requests) / (len(one.requests) + len(two.requests))
    assert 0.3 < share < 0.7


def test_a_request_holds_no_more_than_its_budget(bench: Bench) -> None:
    server = bench.server()
    teacher = bench.teacher(server, prompts_per_request=32, entries_per_request=600)
    begin = len(server.requests)
    teacher.score(bench.rollouts(8))
    asked = [request["prompt"] for request in server.requests[begin:]]
    sizes = [sum(map(len, prompts)) * 9 for prompts in asked if prompts != [canary(teacher)]]
    assert max(sizes) <= 600 and len(sizes) > 1


def test_rows_beyond_the_servers_context_are_missing(bench: Bench) -> None:
    server = bench.server(max_model_len=130)
    teacher = bench.teacher(server)
    short, long = bench.rollouts(1)[0], make_rollout_of(bench.student, b"1 2 3 " * 60)
    found = teacher.score([long, short])
    assert found[1].valid.all()
    cut = int(found[0].valid.sum())
    assert 0 < cut < len(found[0].valid) and found[0].valid[:cut].all()
    assert teacher.missing == {"context": len(found[0].valid) - cut}


def test_no_thread_is_left_behind(bench: Bench) -> None:
    teacher = bench.teacher(bench.server())
    assert any(t.name == "teacher sort" for t in threading.enumerate())
    teacher.close()
    teacher.close()
    assert not any(t.name == "teacher sort" for t in threading.enumerate())
