"""What cannot run on a cluster is refused with what was asked and what there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from mopd.demo import World
from tests.helpers.ray_runs import words
from tests.helpers.runs import launch

pytestmark = [pytest.mark.ray, pytest.mark.e2e]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"student__parallel__tensor_model_parallel_size": 1, "pools__student__num_devices": 8},
            "the plan asks for 10 CPU and the Ray cluster has 8 CPU",
        ),
        (
            {
                "pools__student__num_devices": 4,
                "cluster__num_nodes": 2,
                "cluster__num_devices_per_node": 2,
                "teachers__sort__pool": "student",
                "teachers__upper__pool": "student",
            },
            "cluster.num_nodes: the student's ranks are on 2 nodes, and the Ray cluster has 1",
        ),
    ],
)
def test_more_than_the_cluster_has(
    changes: dict[str, object],
    expected: str,
    tiny_world: World,
    ray_address: str,
    tmp_path: Path,
) -> None:
    done = launch("mopd_ctkd", words(tiny_world, tmp_path, "x", address=ray_address, **changes))
    assert (done.returncode, expected in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "x" / "config.yaml").exists()


def test_an_address_where_nobody_is(tiny_world: World, tmp_path: Path) -> None:
    done = launch("mopd_ctkd", words(tiny_world, tmp_path, "x", address="127.0.0.1:1"))
    assert done.returncode == 2
    assert "ray.address: 127.0.0.1:1 cannot be joined" in done.stderr


def test_under_torchrun_it_is_refused(
    tiny_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch.train import main

    monkeypatch.setenv("RANK", "0")
    assert main(["recipe=mopd_ctkd", *words(tiny_world, tmp_path, "x", address="127.0.0.1:1")]) == 2
