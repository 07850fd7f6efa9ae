"""The driver's side of the ranks, without a cluster: what each is told, and how a run ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mopd.config.cluster import DeviceKind
from mopd.runtime.exits import Ending
from mopd.runtime.placement import Slot, place
from mopd.runtime.ray import students as module
from mopd.runtime.ray.rank import Place
from mopd.runtime.ray.students import Students
from mopd.runtime.ray.watched import Gone
from tests.helpers.ray_plans import recipe, unreserved

pytestmark = pytest.mark.ray

HEAD, OTHER = "10.0.0.1", "10.0.0.2"


def seat(address: str, *devices: str, port: int = 1) -> Place:
    return Place(address=address, pid=7, devices=devices, port=port)


def made(
    *places: Place, device: DeviceKind, nodes: int = 1, tp: int = 1, shown: list[str] | None = None
) -> Students:
    config = recipe(ranks=len(places), tp=tp, nodes=nodes, per_node=len(places) // nodes)
    students = Students(
        config,
        unreserved(place(config, device=device)),
        directory="/",
        world=None,
        key="",
        show=lambda rank, line: shown.append(f"{rank} {line[1]}") if shown is not None else None,
    )
    students._places = list(places)
    return students


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Its nodes."""
    nodes = {HEAD}
    monkeypatch.setattr(module, "node_addresses", lambda: nodes)
    for name in module._PASSED:
        monkeypatch.delenv(name, raising=False)
    yield nodes


def test_ranks_of_one_host(cluster: set[str]) -> None:
    students = made(seat(HEAD, port=4711), seat(HEAD), device="cpu")
    assert students._environment(1) == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",  # nobody else is there
        "MASTER_PORT": "4711",
    }


def test_ranks_of_two_nodes(cluster: set[str]) -> None:
    """Ray may put the student's second node first."""
    cluster.add(OTHER)
    students = made(
        seat(OTHER, "4", port=4711),
        seat(OTHER, "2"),
        seat(HEAD, "0"),
        seat(HEAD, "1"),
        device="gpu",
        nodes=2,
        tp=2,
    )
    found = [students._environment(rank) for rank in range(4)]
    assert [one["LOCAL_RANK"] for one in found] == ["0", "1", "0", "1"]
    assert [one["LOCAL_WORLD_SIZE"] for one in found] == ["2"] * 4
    assert [one["GROUP_RANK"] for one in found] == ["0", "0", "1", "1"]
    assert {one["MASTER_ADDR"] for one in found} == {OTHER}
    assert {one["MASTER_PORT"] for one in found} == {"4711"}
    # each sees those of its node, and its own one at its local rank
    seen = [one["CUDA_VISIBLE_DEVICES"] for one in found]
    assert seen == ["4,2", "4,2", "0,1", "0,1"]
    assert [one["CUDA_VISIBLE_DEVICES"].split(",")[int(one["LOCAL_RANK"])] for one in found] == [
        "4",
        "2",
        "0",
        "1",
    ]
    assert "ASCEND_RT_VISIBLE_DEVICES" not in found[0]


def test_npus_have_a_variable_of_their_own(cluster: set[str]) -> None:
    found = made(seat(HEAD, "3"), seat(HEAD, "5"), device="npu")._environment(0)
    assert found["ASCEND_RT_VISIBLE_DEVICES"] == "3,5"
    assert "CUDA_VISIBLE_DEVICES" not in found


def test_one_rank_in_a_cluster_of_two_nodes(cluster: set[str]) -> None:
    """Engines of the other node never ask it, and its own address serves as well."""
    cluster.add(OTHER)
    assert made(seat(HEAD), device="cpu")._environment(0)["MASTER_ADDR"] == HEAD


def test_what_the_driver_was_given_is_passed_on(
    cluster: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    found = made(seat(HEAD), device="cpu")._environment(0)
    assert found["OMP_NUM_THREADS"] == "3"
    assert "RAY_AUTH_TOKEN" not in found


def test_devices_by_slot() -> None:
    students = made(seat(HEAD, "4"), seat(HEAD, "2"), device="gpu")
    assert students.devices == {Slot(node=0, index=0): "4", Slot(node=0, index=1): "2"}
    assert made(seat(HEAD), device="cpu").devices == {}


class _Rank:
    """In place of a watched actor."""

    def __init__(self, number: int, ending: Ending | None, lines: list[str]) -> None:
        self.name = f"rank {number}"
        self._ending = ending
        self._lines = lines

    def result(self) -> Ending | None:
        return self._ending

    def look(self) -> list[tuple[bool, str]]:
        found, self._lines = [(False, text) for text in self._lines], []
        return found

    def last_look(self, *, timeout_s: float) -> list[list[tuple[bool, str]]]:
        return [self.look()]


WELL = Ending(code=0)
FAILED = Ending(code=1, message="error: x", everywhere=True)
LOST = Ending(code=1, message="gloo", everywhere=True, is_lost=True)
SAVED = Ending(code=143, is_error=False)


def polled(
    *endings: Ending | None, monkeypatch: pytest.MonkeyPatch, follow_s: float
) -> tuple[Ending | None, list[str]]:
    shown: list[str] = []
    students = made(*(seat(HEAD) for _ in endings), device="cpu", shown=shown)
    ranks: list[Any] = [_Rank(n, one, [f"words of {n}"]) for n, one in enumerate(endings)]
    students.watched = ranks
    monkeypatch.setattr(module, "FOLLOW_S", follow_s)
    return students.poll(), shown


@pytest.mark.parametrize(
    ("endings", "expected"),
    [
        ((None, None), None),
        ((WELL, WELL), WELL),
        ((SAVED, SAVED), SAVED),
        ((FAILED, LOST), FAILED),  # the one that knows why
        ((LOST, FAILED), FAILED),
        ((WELL, FAILED), FAILED),
        ((FAILED, None), FAILED),  # the other one hangs in a collective
        ((WELL, None), None),  # the other one writes its checkpoint
    ],
)
def test_how_a_run_ends(
    endings: tuple[Ending | None, ...],
    expected: Ending | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, shown = polled(*endings, monkeypatch=monkeypatch, follow_s=-1.0)
    assert found == expected
    if found is not None:  # nobody's last words are lost
        assert sorted(shown) == [f"{n} words of {n}" for n in range(len(endings))]


def test_the_others_have_a_moment_to_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one to end may be the one that knows nothing."""
    assert polled(LOST, None, monkeypatch=monkeypatch, follow_s=100.0)[0] is None


def test_a_broken_connection_that_nobody_explains_is_a_death(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(Gone, match="connection between the ranks"):
        polled(LOST, LOST, monkeypatch=monkeypatch, follow_s=-1.0)
    with pytest.raises(Gone, match="connection between the ranks"):
        polled(LOST, None, monkeypatch=monkeypatch, follow_s=-1.0)
