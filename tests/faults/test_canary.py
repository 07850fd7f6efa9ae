"""A server that becomes another one while a run goes on: with and without a new connection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from mopd.demo import World
from mopd.errors import TeacherError, TeacherExhausted
from mopd.teachers.remote import RemoteTeacher
from mopd.tokens.chat import ChatTokenizer
from tests.faults import refusals
from tests.helpers.dist import run_ranks
from tests.helpers.runs import words
from tests.helpers.stub_scorers import PrefixScorer
from tests.helpers.stub_server import StubOptions, StubServer
from tests.helpers.teachers import make_rollout_of, remote_teacher

INTERVAL = 5
AFTER_START = 6  # requests: three of the start, one on the first connection, two steps
SIZE = 560


class Bench:
    """One server with its tokenizer, and the teacher in front of it."""

    def __init__(self, world: World, stack: ExitStack) -> None:
        self.student = ChatTokenizer.load(world.student)
        self.tokenizer = ChatTokenizer.load(world.teachers["sort"])
        self._stack = stack

    def server(self, tokenizer: ChatTokenizer | None, *, port: int = 0) -> StubServer:
        options = StubOptions(tokenizer=tokenizer)
        return self._stack.enter_context(StubServer(PrefixScorer(SIZE), options, port=port))

    def teacher(self, server: StubServer, *, canary_interval: int = 0) -> RemoteTeacher:
        teacher = remote_teacher(
            [server.url],
            tokenizer=self.tokenizer,
            student=self.student,
            canary_interval=canary_interval,
            retry={"prompts_per_request": 1, "restart_budget_s": 10.0},
        )
        self._stack.callback(teacher.close)
        return teacher

    def score(self, teacher: RemoteTeacher, times: int = 1) -> None:
        for number in range(times):
            (scores,) = teacher.score([make_rollout_of(self.student, b"bo %d ka" % number)])
            assert scores.valid.all()


@pytest.fixture
def bench(tiny_world: World) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(tiny_world, stack)


def canaries(teacher: RemoteTeacher, server: StubServer) -> int:
    wanted = [teacher._canary.prompts[0].tolist()]
    return sum(request["prompt"] == wanted for request in server.requests)


@contextmanager
def other_weights(server: StubServer) -> Iterator[None]:
    """In place: same process, same connections."""
    before, server._scorer = server._scorer, PrefixScorer(SIZE, seed=7)
    yield
    server._scorer = before


def test_other_weights_in_place_are_seen_at_the_next_canary(bench: Bench) -> None:
    server = bench.server(bench.tokenizer)
    teacher = bench.teacher(server, canary_interval=INTERVAL)
    bench.score(teacher, INTERVAL)
    with other_weights(server), pytest.raises(TeacherError, match="away from before") as caught:
        bench.score(teacher, INTERVAL + 1)
    assert not isinstance(caught.value, TeacherExhausted)


def test_without_an_interval_only_new_connections_are_looked_at(bench: Bench) -> None:
    server = bench.server(bench.tokenizer)
    teacher = bench.teacher(server)
    bench.score(teacher)
    begin = canaries(teacher, server)
    with other_weights(server):
        bench.score(teacher, 3 * INTERVAL)
    assert canaries(teacher, server) == begin


def test_a_canary_comes_after_every_interval_and_never_trains(bench: Bench) -> None:
    server = bench.server(bench.tokenizer)
    teacher = bench.teacher(server, canary_interval=INTERVAL)
    bench.score(teacher)
    begin, asked = canaries(teacher, server), len(server.requests)
    bench.score(teacher, 4 * INTERVAL)
    found = canaries(teacher, server) - begin
    assert found in (3, 4) and len(server.requests) - asked == 4 * INTERVAL + found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (refusals.without_a_merge, "other merges or pieces"),
        (refusals.another_revision, "other merges or pieces"),
    ],
)
def test_a_server_that_comes_back_with_another_tokenizer_is_seen(
    bench: Bench, tiny_world: World, tmp_path: Path, change: Callable, message: str
) -> None:
    """Its scores are those of before: only ``/tokenize`` tells."""
    path = refusals.changed_copy(tiny_world.teachers["sort"], tmp_path / "other", tokenizer=change)
    server = bench.server(bench.tokenizer)
    teacher = bench.teacher(server)
    bench.score(teacher)
    server.stop()
    bench.server(ChatTokenizer.load(path), port=server.port)
    with pytest.raises(TeacherError, match=message) as caught:
        bench.score(teacher)
    assert not isinstance(caught.value, TeacherExhausted)


def test_a_server_that_comes_back_as_it_was_goes_on(bench: Bench) -> None:
    server = bench.server(bench.tokenizer)
    teacher = bench.teacher(server)
    bench.score(teacher)
    server.stop()
    back = bench.server(bench.tokenizer, port=server.port)
    bench.score(teacher)
    assert any("prompt" in asked for asked in back.tokenized)
    assert any("messages" in asked for asked in back.tokenized)


@pytest.mark.dist
@pytest.mark.parametrize(("interval", "code"), [(2, 1), (0, 0)])
def test_the_recipe_says_how_often(
    tiny_world: World, tmp_path: Path, interval: int, code: int
) -> None:
    server = StubServer(PrefixScorer(SIZE))

    def swap(number: int, request: dict[str, Any]) -> None:
        if number == AFTER_START:
            server._scorer = PrefixScorer(SIZE, seed=7)

    server.options.fault = swap
    with server:
        overrides = words(
            tiny_world,
            tmp_path,
            "run",
            train__steps=6,
            distillation__top_k=16,
            data__heldout_path="null",
            teachers__sort__domains="[]",
            teachers__sort__backend__type="vllm",
            teachers__sort__backend__urls=f"[{server.url}]",
            teachers__sort__backend__canary_interval=interval,
        )
        overrides = [word for word in overrides if not word.startswith("teachers.upper.")]
        (start,) = run_ranks(refusals.start_here, 1, overrides)
    assert start.code == code, start.errors
    assert any("away from before" in line for line in start.errors) == (code == 1)
