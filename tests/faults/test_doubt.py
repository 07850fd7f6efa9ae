"""Refusals and slowness that may be the prompt's fault, the server's, or nobody's."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from mopd.errors import TeacherError, TeacherExhausted
from mopd.serving import http as http_module
from mopd.teachers.remote import RemoteTeacher
from tests.faults.test_outages import DEADLINE, MARGIN_S, Bench, all_same, bench, canary, hang
from tests.helpers.stub_scorers import PrefixScorer
from tests.helpers.stub_server import Fault, StubOptions, StubServer, send, send_json
from tests.helpers.teachers import remote_teacher

__all__ = ["bench"]  # a fixture

SLOW_S = 0.6 * DEADLINE
REFUSED = b"bo 1 ka"


class Stranger(StubServer):
    """Another program behind the address: 404 on every path."""

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        await reader.readexactly(int(length or b"0"))
        await send(writer, b"404 page not found", status=404)
        return True


class Slow(StubServer):
    """Late with everything, and never too late."""

    async def _about(self, writer: asyncio.StreamWriter, path: str, body: bytes) -> None:
        await asyncio.sleep(0.4 * DEADLINE)
        await super()._about(writer, path, body)


def replace(bench: Bench, server: StubServer, kind: type[StubServer], **options: Any) -> StubServer:
    """Another server on the port of ``server``, which ends."""
    server.stop()
    scorer = PrefixScorer(bench.tokenizer.vocabulary.size)
    again = kind(scorer, StubOptions(**options), port=server.port)
    return bench._stack.enter_context(again)


def status(code: int, body: bytes = b"{}", **headers: str) -> Fault:
    async def fault(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> bool:
        await send(writer, body, status=code, headers=headers)
        return True

    return fault


async def slow(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> bool:
    await asyncio.sleep(SLOW_S)
    await send_json(writer, reply)
    return True


def refusing(bench: Bench, code: int = 400) -> Callable[[int, dict[str, Any]], Fault | None]:
    """Says no to one prompt, for ever."""
    fault, ids = status(code), bench.tokenizer.text_ids(REFUSED.decode())

    def choose(number: int, request: dict[str, Any]) -> Fault | None:
        return fault if any(holds(prompt, ids) for prompt in request["prompt"]) else None

    return choose


def holds(prompt: list[int], ids: Any) -> bool:
    text, wanted = list(prompt), list(ids)
    return any(text[i : i + len(wanted)] == wanted for i in range(len(text)))


def canaries(teacher: RemoteTeacher, server: StubServer) -> int:
    return sum(request["prompt"] == [canary(teacher)] for request in server.requests)


def is_asked_again(bench: Bench, teacher: RemoteTeacher, server: StubServer) -> bool:
    end = time.monotonic() + 15.0
    while time.monotonic() < end:
        teacher.score(bench.rollouts())
        if any(request["prompt"] != [canary(teacher)] for request in server.requests):
            return True
    return False


def test_a_replica_that_came_back_as_something_else_swallows_no_sample(bench: Bench) -> None:
    one, two = bench.server(), bench.server()
    teacher = bench.teacher(one, two)
    clean = teacher.score(bench.rollouts())
    stranger = replace(bench, two, Stranger)
    for _ in range(3):
        assert all_same(teacher.score(bench.rollouts()), clean)
        time.sleep(0.1)
    assert not teacher.missing
    assert teacher.events["models"] >= 2 and teacher.events["status_4xx"] == 0
    back = replace(bench, stranger, StubServer)
    assert is_asked_again(bench, teacher, back)
    assert back.requests[0]["prompt"] == [canary(teacher)]


def test_two_of_three_are_something_else(bench: Bench) -> None:
    """Two refusals, and nobody who is well has refused anything."""
    servers = [bench.server() for _ in range(3)]
    teacher = bench.teacher(*servers)
    clean = teacher.score(bench.rollouts())
    for server in servers[:2]:
        replace(bench, server, Stranger)
    assert all_same(teacher.score(bench.rollouts()), clean)
    assert not teacher.missing


def test_a_sole_server_that_is_something_else_is_away(bench: Bench) -> None:
    server = bench.server()
    teacher = bench.teacher(server, restart_budget_s=20.0)
    clean = teacher.score(bench.rollouts())
    stranger = replace(bench, server, Stranger)
    timer = threading.Timer(0.7, replace, [bench, stranger, StubServer])
    timer.start()
    assert all_same(teacher.score(bench.rollouts()), clean)
    timer.join()
    assert not teacher.missing


def test_a_refusal_of_one_that_was_away_says_nothing_of_the_prompt(bench: Bench) -> None:
    """One refuses while it is away, and is well again when the other one refuses, away as well."""
    early, late = bench.server(), bench.server()
    teacher = bench.teacher(early, late, restart_budget_s=20.0)
    clean = teacher.score(bench.rollouts())
    well = canaries(teacher, early) + 2  # the first probe fails

    async def late_no(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> bool:
        while canaries(teacher, early) < well:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        await send(writer, b"404 page not found", status=404)
        return True

    away = status(404)
    early.options.fault = lambda n, request: away if canaries(teacher, early) < well else None
    late.options.fault = lambda n, request: late_no
    assert all_same(teacher.score(bench.rollouts(2)), clean[:2])
    assert teacher.events["status_4xx"] >= 3 and not teacher.missing


@pytest.mark.parametrize("everything", [True, False])
def test_a_sole_server_that_stays_something_else_ends_the_run(
    bench: Bench, everything: bool
) -> None:
    """Also where it lists its models and only scores nothing."""
    server = bench.server()
    teacher = bench.teacher(server, restart_budget_s=0.5)
    teacher.score(bench.rollouts(1))
    if everything:
        replace(bench, server, Stranger)
    else:
        server.options.fault = lambda number, request: status(404)
    with pytest.raises(TeacherExhausted, match=r"teachers\.sort: no replica.*404"):
        teacher.score(bench.rollouts(2))
    assert not teacher.missing


@pytest.mark.parametrize("number", [1, 2])
def test_a_prompt_that_all_refuse_is_missing_alone(bench: Bench, number: int) -> None:
    servers = [bench.server() for _ in range(number)]
    teacher = bench.teacher(*servers, max_retries=0)
    clean = teacher.score(bench.rollouts())
    for server in servers:
        server.options.fault = refusing(bench)
    found = teacher.score(bench.rollouts())
    assert all_same(found[:1] + found[2:], clean[:1] + clean[2:])
    assert not found[1].valid.any()
    assert teacher.missing == {"status_4xx": len(found[1].valid)}
    assert teacher.events == {"status_4xx": 2}  # one is asked again, or another one
    for server in servers:
        assert is_asked_again(bench, teacher, server)


def test_a_prompt_that_one_replica_refuses_is_scored_by_the_other(bench: Bench) -> None:
    one, two = bench.server(), bench.server()
    teacher = bench.teacher(one, two, max_retries=0)
    clean = teacher.score(bench.rollouts())
    two.options.fault = refusing(bench)
    # once it is well again, the same prompt may come to it twice
    while not teacher.events["status_4xx"]:
        assert all_same(teacher.score(bench.rollouts(2)), clean[:2])
    assert not teacher.missing
    assert canaries(teacher, two) == 2 or is_asked_again(bench, teacher, two)


def test_a_replica_that_serves_another_name_still_ends_the_run(bench: Bench) -> None:
    one, two = bench.server(), bench.server()
    teacher = bench.teacher(one, two)
    teacher.score(bench.rollouts())
    stranger = replace(bench, two, Stranger)
    teacher.score(bench.rollouts())
    replace(bench, stranger, StubServer, model="other")
    end = time.monotonic() + 15.0
    with pytest.raises(TeacherError, match="served 'stub' before and now 'other'"):
        while time.monotonic() < end:
            teacher.score(bench.rollouts())


@pytest.mark.parametrize("kind", [StubServer, Slow])
def test_a_slow_check_of_a_new_connection_is_no_livelock(
    bench: Bench, kind: type[StubServer]
) -> None:
    """Every request is answered in time; request and check together are not."""
    server = bench.server()
    teacher = bench.teacher(server, deadline_s=DEADLINE, max_retries=2, restart_budget_s=30.0)
    clean = teacher.score(bench.rollouts(1))
    replace(bench, server, kind, fault=lambda number, request: slow)
    assert all_same(teacher.score(bench.rollouts(1)), clean)
    assert teacher.events["timeout"] or kind is StubServer  # what was cut short went on


def test_a_revived_replica_is_not_checked_twice(bench: Bench) -> None:
    server = bench.server()
    teacher = bench.teacher(server, deadline_s=DEADLINE, restart_budget_s=20.0)
    clean = teacher.score(bench.rollouts(1))
    begin, sick = canaries(teacher, server), len(server.requests)
    server.options.fault = lambda number, request: hang if number == sick else None
    for _ in range(3):
        assert all_same(teacher.score(bench.rollouts(1)), clean)
    assert teacher.events == {"timeout": 1}
    assert canaries(teacher, server) == begin + 1


def test_a_check_that_hangs_costs_one_more_deadline(bench: Bench) -> None:
    server = bench.server()
    teacher = bench.teacher(server, deadline_s=DEADLINE, max_retries=0)
    teacher.score(bench.rollouts(1))

    def fault(number: int, request: dict[str, Any]) -> Fault:
        return hang if request["prompt"] == [canary(teacher)] else slow

    replace(bench, server, StubServer, fault=fault)
    begin = time.monotonic()
    with pytest.raises(TeacherExhausted, match=f"within {DEADLINE:g} s"):
        teacher.score(bench.rollouts(1))
    assert SLOW_S + DEADLINE < time.monotonic() - begin < 2 * DEADLINE + MARGIN_S


def test_connections_live_as_long_as_a_long_step(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was given up is checked again."""
    assert http_module.IDLE_S >= 600.0
    monkeypatch.setattr(http_module, "IDLE_S", 0.2)
    server = bench.server(tokenizer=bench.tokenizer)
    teacher = bench.teacher(server)
    teacher.score(bench.rollouts(1))
    asked, told, known = len(server.requests), len(server.tokenized), canaries(teacher, server)
    time.sleep(0.4)
    teacher.score(bench.rollouts(1))
    assert len(server.requests) - asked == 2 and canaries(teacher, server) - known == 1
    assert len(server.tokenized) - told == 7  # what a check asks, as the documentation says


def test_the_address_of_the_hosts_name_is_looked_at_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = bench.server()
    teacher = bench.teacher(server, restart_budget_s=20.0)
    teacher.score(bench.rollouts(1))

    async def elsewhere(*arguments: object, **keys: object) -> list[Any]:
        return [(2, 1, 6, "", ("169.254.169.254", 80))]

    monkeypatch.setattr(teacher._replicas._thread.loop, "getaddrinfo", elsewhere)
    replace(bench, server, StubServer)
    with pytest.raises(TeacherError, match="the host is a cloud metadata address") as caught:
        teacher.score(bench.rollouts(1))
    assert not isinstance(caught.value, TeacherExhausted)


def test_a_server_with_other_paths_is_believed_only_after_its_check(bench: Bench) -> None:
    """It closes the connection behind its check, and another model answers the next one."""
    server = bench.server(generate=True)
    teacher = bench.teacher(server)
    teacher.score(bench.rollouts(1))
    again = replace(bench, server, StubServer, generate=False)

    def fault(number: int, request: dict[str, Any]) -> Fault | None:
        return last_words if request["prompt"] == [canary(teacher)] else None

    async def last_words(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> bool:
        await send_json(writer, reply)
        again._scorer = PrefixScorer(bench.tokenizer.vocabulary.size, seed=7)
        again.options.fault = lambda number, request: None
        return False

    again.options.fault = fault
    with pytest.raises(TeacherError, match="away from before"):
        teacher.score(bench.rollouts(1))


def test_a_better_path_that_breaks_is_not_taken(bench: Bench) -> None:
    server = bench.server(generate=True, fault=lambda n, asked: broken(asked))
    teacher = bench.teacher(server)
    assert all(scores.valid.all() for scores in teacher.score(bench.rollouts(2)))
    assert teacher._replicas.endpoints[0].protocol.path == "/v1/completions"


def test_two_paths_that_break_are_told(bench: Bench) -> None:
    server = bench.server(generate=True, fault=lambda n, asked: status(500, b"out of memory"))
    message = r"/inference/v1/generate answered 500.*/v1/completions does no better.*start it again"
    with pytest.raises(TeacherError, match=message):
        remote_teacher(
            [server.url],
            tokenizer=bench.tokenizer,
            student=bench.student,
            endpoint={"start_s": 0.5},
        )


def broken(asked: dict[str, Any]) -> Fault | None:
    return status(500) if "token_ids" in asked else None


def test_a_busy_server_is_left_alone_and_not_probed(bench: Bench) -> None:
    server = bench.server()
    teacher = bench.teacher(server, max_retries=0, restart_budget_s=20.0)
    clean = teacher.score(bench.rollouts())
    begin, first = canaries(teacher, server), len(server.requests)
    busy = status(429, b"{}", **{"Retry-After": "1"})
    server.options.fault = lambda number, request: busy if number < first + 3 else None
    since = time.monotonic()
    assert all_same(teacher.score(bench.rollouts()), clean)
    assert 1.0 <= time.monotonic() - since < 15.0
    assert teacher.events == {"busy": 3}
    assert canaries(teacher, server) == begin


def test_a_server_that_is_busy_for_ever_ends_the_run(bench: Bench) -> None:
    server = bench.server()
    teacher = bench.teacher(server, max_retries=1, restart_budget_s=0.5)
    teacher.score(bench.rollouts(1))
    server.options.fault = lambda number, request: status(429)
    with pytest.raises(TeacherExhausted, match="answered 429"):
        teacher.score(bench.rollouts())
