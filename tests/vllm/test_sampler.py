"""The contract of samplers, on a real vLLM server that has the tiny world's student."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mopd.demo import World
from tests.helpers.plain_model import PlainModel
from tests.helpers.runs import launch, step_lines, words
from tests.helpers.sampler_contract import *  # noqa: F403 - its tests run here
from tests.helpers.samplers import Site
from tests.helpers.vllm_server import VllmServer, run_vllm_server, vllm_python

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    vllm_python()  # before the world is built for nothing
    world: World = request.getfixturevalue("tiny_world")
    log = tmp_path_factory.mktemp("sampler") / "server.log"
    with run_vllm_server(world.student, log=log, sampling=True) as server:
        yield server


@pytest.fixture(scope="module")
def model(tiny_world: World) -> PlainModel:
    return PlainModel(tiny_world.student)


@pytest.fixture
def site(server: VllmServer, model: PlainModel, tmp_path: Path) -> Site:
    return Site(urls=(server.url,), model=model, root=tmp_path / "weights")


@pytest.mark.parametrize("mode", ["files", "broadcast"])
def test_a_run_samples_on_the_server_and_replays_in_process_with_the_same_losses(
    server: VllmServer, tiny_world: World, tmp_path: Path, mode: str
) -> None:
    backend = {"type": "vllm", "urls": f"[{server.url}]", "weight_sync": mode}
    settings = {f"rollout__backend__{key}": value for key, value in backend.items()}
    done = launch("mopd_ctkd", words(tiny_world, tmp_path, "served", **settings))
    assert done.returncode == 0, done.stderr[-2000:]
    backend = {"type": "replay", "path": tmp_path / "served"}
    settings = {f"rollout__backend__{key}": value for key, value in backend.items()}
    done = launch("mopd_ctkd", words(tiny_world, tmp_path, "replayed", **settings))
    assert done.returncode == 0, done.stderr[-2000:]
    served, replayed = (step_lines(tmp_path / name) for name in ("served", "replayed"))
    assert len(served) == len(replayed) == 4
    for one, other in zip(served, replayed, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-3)
        assert one["sync/probe"] < 1e-3 and other["sync/probe"] < 1e-3
