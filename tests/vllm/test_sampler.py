"""The contract of samplers, on a real vLLM server that has the tiny world's student."""

from __future__ import annotations

import asyncio
import re
import secrets
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from mopd.demo import World
from mopd.serving.sample_server import SampleServer
from mopd.serving.sampling import SampleOptions, SampleRequest, SampleTask, Update
from mopd.serving.weight_files import write_weights
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


def test_a_request_whose_client_is_gone_is_aborted_in_the_engine(
    server: VllmServer, site: Site
) -> None:
    version, size = f"{secrets.token_hex(8)}/0", site.model.tokenizer.vocabulary.size
    path = write_weights(site.root, version, site.model.weights(0))
    update = Update(version=version, vocab_size=size, deadline_s=30.0, path=str(path))
    tasks = tuple(SampleTask(ids=[5, 6, 7], seed=n) for n in range(96))

    async def leave(client: SampleServer) -> None:
        await client.update(update)
        length = (await client.facts()).max_length
        options = SampleOptions(
            max_tokens=length - 3, temperature=1.0, vocab_size=size, eos_id=size - 1
        )
        request = SampleRequest(version=version, options=options, tasks=tasks)
        asking = asyncio.create_task(client.sample(request))
        while not await asyncio.to_thread(_running, server.url):
            assert not asking.done()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    before = _finished(server.url)
    site.ask(leave)
    site.ask(lambda client: client.update(update))  # waits for what is running
    assert _finished(server.url) < before + len(tasks)


def _finished(url: str) -> float:
    """Requests that the engine brought to their end."""
    return _told(url, "request_success_total")


def _running(url: str) -> float:
    """Requests that the engine is busy with."""
    return _told(url, "num_requests_running")


def _told(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10.0) as reply:
        text = reply.read().decode()
    return sum(map(float, re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", text, re.M)))
