"""Engines that take turns: never two at once, all of them come on, nothing moves without need."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mopd.errors import MopdError
from mopd.serving.lease import DeviceLease, LeaseTimeout
from mopd.serving.turns import Turns
from tests.helpers.small_server import wait_until


class Engine:
    """Counts its moves; fails where another one is on the device, or where it is not itself."""

    on_device: str | None = None  # of all engines

    def __init__(self, path: Path, name: str, **keys: float) -> None:
        self.name, self.moves = name, []
        self.problem: Exception | None = None
        options = {"quantum_s": 0.1, "linger_s": 0.01, "wait_s": 20.0} | keys
        self.turns = Turns(
            DeviceLease(path, owner=name), load=self.load, release=self.release, **options
        )

    def load(self) -> None:
        assert Engine.on_device is None, "two are on the device"
        if self.problem is not None:
            raise self.problem
        Engine.on_device = self.name
        self.moves.append("load")

    def release(self) -> None:
        if Engine.on_device == self.name:
            Engine.on_device = None
        self.moves.append("release")

    def ask(self, seconds: float = 0.0) -> None:
        with self.turns.turn():
            assert Engine.on_device == self.name
            time.sleep(seconds)
            assert Engine.on_device == self.name


Make = Callable[..., Engine]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    Engine.on_device = None
    made: list[Engine] = []

    def engine(name: str, **keys: float) -> Engine:
        made.append(Engine(tmp_path / "pool.lease", name, **keys))
        return made[-1]

    yield engine
    for one in made:
        one.turns.close()
    assert Engine.on_device is None


def test_the_one_who_has_it_pays_nothing(make: Make) -> None:
    one = make("a")
    for _ in range(20):
        one.ask()
    time.sleep(0.1)  # longer than it may linger, and a quantum
    one.ask()
    assert one.moves == ["load"]


def test_it_leaves_when_another_one_asks(make: Make) -> None:
    one, two = make("a", quantum_s=60.0), make("b")
    one.ask()
    two.ask()
    assert one.moves == ["load", "release"] and two.moves == ["load"]
    one.ask()
    assert one.moves == ["load", "release", "load"]


def test_nobody_starves_under_constant_load(make: Make) -> None:
    engines = [make(name) for name in "abc"]
    counts = [0, 0, 0]
    failures: list[BaseException] = []
    end = threading.Event()

    def keep_asking(number: int) -> None:
        try:
            while not end.is_set():
                engines[number].ask(0.005)
                counts[number] += 1
        except BaseException as error:
            failures.append(error)

    # two clients each: the engine is never idle
    threads = [threading.Thread(target=keep_asking, args=(n,)) for n in (0, 1, 2) * 2]
    for thread in threads:
        thread.start()
    # a load may bring no more than one answer, where a pause takes the rest of its quantum
    wait_until(
        lambda: failures or (all(e.moves.count("load") >= 3 for e in engines) and min(counts) > 3),
        seconds=60,
    )
    end.set()
    for thread in threads:
        thread.join()
    assert failures == [] and min(counts) > 3


def test_requests_of_one_engine_run_together(make: Make) -> None:
    one = make("a")
    both = threading.Barrier(2, timeout=20.0)

    def ask() -> None:
        with one.turns.turn():
            both.wait()

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not both.broken


def test_a_request_is_never_cut_off(make: Make) -> None:
    one, two = make("a", quantum_s=0.0), make("b")
    thread = threading.Thread(target=one.ask, args=(0.4,))
    thread.start()
    wait_until(lambda: Engine.on_device == "a")
    two.ask()
    thread.join()
    assert one.moves == ["load", "release"]


def test_waits_are_bounded_and_say_who_is_in_the_way(make: Make) -> None:
    one, two = make("a"), make("b", wait_s=0.1)
    with one.turns.turn():
        with pytest.raises(LeaseTimeout, match=r"b: no turn .* 0\.1 s; a \(process"):
            two.ask()
        assert two.moves == []
    two.turns._wait_s = 20.0
    two.ask()


def test_what_cannot_be_loaded_is_said_and_tried_again(make: Make) -> None:
    one, two = make("a"), make("b")
    one.problem = TimeoutError("out of memory")
    with pytest.raises(TimeoutError, match="out of memory"):
        one.ask()
    two.ask()  # the lease is free
    one.problem = None
    one.ask()


def test_an_engine_that_cannot_leave_lets_others_go_on_and_says_so(make: Make) -> None:
    one, two = make("a"), make("b")
    one.ask()

    def fail() -> None:
        Engine.on_device = None
        raise RuntimeError("stuck")

    one.turns._release = fail
    two.ask()
    with pytest.raises(MopdError, match="a: cannot leave its devices"):
        one.ask()


def test_an_event_loop_goes_on_while_it_waits(make: Make) -> None:
    one, two = make("a"), make("b")
    ticked = threading.Event()

    def hold() -> None:
        with one.turns.turn():
            assert ticked.wait(15.0)

    async def tick() -> None:
        for _ in range(6):
            await asyncio.sleep(0.005)
        ticked.set()

    async def ask(number: int) -> None:
        async with two.turns.aturn():
            assert Engine.on_device == "b"
            await asyncio.sleep(0.001 * number)

    async def work() -> None:
        thread = threading.Thread(target=hold)
        thread.start()
        while Engine.on_device != "a":
            await asyncio.sleep(0.001)
        # all of them wait when the first tick comes
        await asyncio.gather(*(ask(n) for n in range(20)), tick())
        thread.join()

    asyncio.run(work())
    assert two.moves == ["load"]


def test_whoever_gives_up_waiting_leaves_nothing_behind(make: Make) -> None:
    one, two = make("a"), make("b")

    async def work() -> None:
        with one.turns.turn():
            waiting = asyncio.create_task(two.turns.aturn().__aenter__())
            await asyncio.sleep(0.05)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    asyncio.run(work())
    time.sleep(0.2)
    assert two.moves == [] and two.turns._active == 0
    two.ask()


def test_a_lease_that_is_held_comes_with_its_engine_on_the_device(
    make: Make, tmp_path: Path
) -> None:
    held = DeviceLease(tmp_path / "pool.lease", owner="a")
    held.acquire(wait_s=0.0)
    Engine.on_device = "a"
    moves: list[str] = []

    def release() -> None:
        Engine.on_device = None
        moves.append("release")

    one = Turns(held, load=lambda: moves.append("load"), release=release, linger_s=0.0)
    with one.turn():
        assert moves == []
    make("b").ask()
    assert moves == ["release"]
    one.close()
    with pytest.raises(MopdError, match="being closed"), one.turn():
        pass
