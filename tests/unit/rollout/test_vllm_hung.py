"""What servers cost that hang, come back, or keep a trainer waiting."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mopd.demo import World
from mopd.errors import SamplerError
from mopd.serving.sampling import LOGPROBS_PATH, SAMPLE_PATH, WEIGHTS_PATH
from tests.helpers.plain_model import PlainModel
from tests.helpers.sample_engine import EngineOptions
from tests.helpers.samplers import PROMPTS
from tests.unit.rollout.test_vllm_faults import Hosts

pytestmark = pytest.mark.usefixtures("made_up_params")
TEXT = np.arange(5, 40)
# a deadline that a busy machine's pause does not outlast where a server is well
FAST = {"deadline_s": 4.0, "update_s": 40.0, "start_s": 20.0}


@pytest.fixture(scope="module")
def model(tiny_world: World) -> PlainModel:
    return PlainModel(tiny_world.student)


@pytest.fixture
def hosts(model: PlainModel, tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(model, tmp_path / "weights") as hosts:
        yield hosts


class Hung:
    """Listens where a server was, and never answers; counts who came."""

    def __init__(self, port: int) -> None:
        self.asked = 0
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", port))
        self._listener.listen(64)
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def _accept(self) -> None:
        while True:
            try:
                self._open.append(self._listener.accept()[0])
            except OSError:
                return
            self.asked += 1

    def __enter__(self) -> Hung:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5.0)
        for each in self._open:
            each.close()


def test_a_server_that_hangs_costs_one_short_deadline_and_comes_back(hosts: Hosts) -> None:
    hosts.start()
    hosts.start()
    with hosts.site().sampler(server=FAST) as sampler:

        def step(version: int) -> tuple[int, float]:
            began = time.monotonic()
            weights = hosts.model.weights(version)
            sampler.load_weights(weights.items(), version=version)
            rows = sampler.probe(TEXT)
            assert len(sampler.generate(PROMPTS, step=version, version=version)) == 6
            assert np.abs(rows - hosts.model.scores(weights, TEXT.tolist())).max() < 1e-3
            return len(rows), time.monotonic() - began

        assert step(0)[0] == 2
        hosts.live[1].stop()
        with Hung(hosts.live[1].port) as hung:
            rows, first = step(1)
            later = [step(version) for version in range(2, 8)]
            assert rows == 1 and {rows for rows, _ in later} == {1}
            # far below `update_s`; then all of six steps in less than six deadlines
            assert first < 30.0 and sum(seconds for _, seconds in later) < 6 * FAST["deadline_s"]
            assert hung.asked >= 1 and sampler.events["timeout"] >= 1
        hosts.restart(1)
        end, version = time.monotonic() + 30.0, 8
        while step(version)[0] < 2 and time.monotonic() < end:
            version += 1
        assert sampler.probed == tuple(host.url for host in hosts.live)
    posts = hosts.live[1].posts
    assert posts[0] == WEIGHTS_PATH and LOGPROBS_PATH in posts


def test_a_server_that_comes_back_is_compared_before_its_first_answer(hosts: Hosts) -> None:
    hosts.start()
    with hosts.site().sampler() as sampler:
        sampler.load_weights(hosts.model.weights(0).items(), version=0)
        sampler.probe(TEXT)
        hosts.restart(0)
        sampler.generate(PROMPTS, step=0, version=0)
        posts = hosts.live[0].posts
        assert posts[posts.index(WEIGHTS_PATH) :][:3] == [WEIGHTS_PATH, LOGPROBS_PATH, SAMPLE_PATH]
        hosts.restart(0, EngineOptions(bias=3.0))  # the same weights in another model
        url = hosts.live[0].url
        with pytest.raises(SamplerError, match=rf"{url} came back .*probe_tolerance"):
            sampler.generate(PROMPTS, step=0, version=0)


def test_a_request_whose_client_is_gone_leaves_the_engine(hosts: Hosts) -> None:
    """Twelve tokens of a second each: it would keep the next update waiting."""
    hosts.start()
    engine = hosts.live[0].engine
    with hosts.site().sampler(
        server={**FAST, "deadline_s": 0.5}, fleet={"max_retries": 0, "restart_budget_s": 0.0}
    ) as sampler:
        sampler.load_weights(hosts.model.weights(0).items(), version=0)
        engine.options.slow_s = 1.0
        with pytest.raises(SamplerError, match="no whole reply"):
            sampler.generate(PROMPTS, step=0, version=0)
        end = time.monotonic() + 5.0
        while engine.running and time.monotonic() < end:
            time.sleep(0.01)
        assert not engine.running


def test_a_server_without_the_extension_is_refused_at_once(hosts: Hosts) -> None:
    hosts.start(EngineOptions(extended=False))
    with pytest.raises(SamplerError, match=r"no mopd_device.*--worker-extension-cls mopd"):
        hosts.site().sampler(server={"start_s": 3600.0}).__enter__()


def test_waiting_for_another_replica_is_no_failure_of_a_server(hosts: Hosts) -> None:
    """The one that pushes takes longer than any server may be away."""
    hosts.start()
    lead = {"session": "0123456789"}
    follow = {
        "sync": {**lead, "pushes": False},
        "fleet": {"patience_s": 60.0, "max_retries": 0, "restart_budget_s": 0.0},
    }
    weights = hosts.model.weights(0)
    with hosts.site().sampler(sync=lead) as first, hosts.site().sampler(**follow) as second:
        second.load_weights(weights.items(), version=0)
        late = threading.Timer(1.0, lambda: first.load_weights(weights.items(), version=0))
        late.start()
        assert len(second.generate(PROMPTS, step=0, version=0)) == 6
        late.join()
        assert not second.events
    assert hosts.live[0].posts.count(WEIGHTS_PATH) == 1


@pytest.mark.parametrize("made", [True, False])
def test_nothing_of_the_weights_is_left(hosts: Hosts, made: bool) -> None:
    hosts.start()
    other = hosts.root / "9876543210"
    if not made:
        other.mkdir(parents=True)
    with hosts.site().sampler(sync={"session": "0123456789"}) as sampler:
        sampler.load_weights(hosts.model.weights(0).items(), version=0)
        assert (hosts.root / "0123456789" / "0").is_dir()
    assert not (hosts.root / "0123456789").exists()
    assert hosts.root.exists() is not made and other.exists() is not made


def test_closing_ends_what_another_thread_asks(hosts: Hosts) -> None:
    """Requests to several servers: what fails at one must not begin again at another."""
    told: list[str] = []
    for _ in range(3):
        hosts.start()
    with hosts.site().sampler(batch_size=1) as sampler:
        sampler.load_weights(hosts.model.weights(0).items(), version=0)
        for host in hosts.live:
            host.engine.options.slow_s = 30.0

        def ask() -> None:
            try:
                sampler.generate(PROMPTS, step=0, version=0)
            except SamplerError as error:
                told.append(str(error))

        asking = threading.Thread(target=ask)
        asking.start()
        while not all(host.engine.running for host in hosts.live):
            time.sleep(0.01)
        began = time.monotonic()
        sampler.close()
        asking.join(10.0)
        assert time.monotonic() - began < 25.0 and told == [
            "rollout.backend: closed while it was asked"
        ]
