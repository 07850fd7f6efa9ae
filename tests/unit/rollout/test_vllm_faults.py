"""What a sampler on servers does when they fail, restart, or are not what is needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from mopd.demo import World
from mopd.errors import SamplerError
from mopd.serving.sampling import LOGPROBS_PATH, SAMPLE_PATH, WEIGHTS_PATH
from mopd.serving.vllm_command import TOKEN_VARIABLE
from tests.helpers.plain_model import PlainModel, prompts_of
from tests.helpers.sample_engine import EngineOptions, SampleHost, make_up_params
from tests.helpers.sampler_contract import held, ids_of
from tests.helpers.samplers import PROMPTS, Mode, Site
from tests.helpers.small_server import wait_until
from tests.helpers.stub_server import StubServer

pytestmark = pytest.mark.usefixtures("made_up_params")
MANY = prompts_of(*(f"sort {n} bo" for n in range(6)))
IMPATIENT = {"max_retries": 1, "restart_budget_s": 0.3}


@pytest.fixture(scope="module")
def model(tiny_world: World) -> PlainModel:
    return PlainModel(tiny_world.student)


class Hosts:
    """Servers that may be killed and started again at the same place."""

    def __init__(self, model: PlainModel, root: Path) -> None:
        self.model, self.root = model, root
        self.live: list[SampleHost] = []
        self._stack = ExitStack()

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(self, options: EngineOptions | None = None, *, port: int = 0) -> SampleHost:
        host = SampleHost(self.model.model_dir, options, port=port)
        self.live.append(self._stack.enter_context(host))
        return host

    def restart(self, number: int, options: EngineOptions | None = None) -> None:
        self.live[number].stop()
        self.live[number] = self.start(options, port=self.live[number].port)
        self.live.pop()

    def site(self) -> Site:
        return Site(urls=tuple(host.url for host in self.live), model=self.model, root=self.root)


@pytest.fixture
def hosts(model: PlainModel, tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(model, tmp_path / "weights") as hosts:
        yield hosts


@pytest.fixture(scope="module")
def answers(model: PlainModel, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What one server, left in peace, answers with the weights 0 at step 0."""
    root = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch, Hosts(model, root) as hosts:
        make_up_params(patch)
        hosts.start()
        with hosts.site().sampler() as sampler:
            sampler.load_weights(model.weights(0).items(), version=0)
            return ids_of(sampler.generate(MANY, step=0, version=0))


@pytest.mark.parametrize("mode", ["files", "broadcast"])
def test_answers_are_shared_over_servers_and_the_same_as_from_one(
    hosts: Hosts, mode: Mode, answers: list[list[int]]
) -> None:
    hosts.start()
    hosts.start()
    with hosts.site().sampler(mode) as sampler:
        sampler.load_weights(hosts.model.weights(0).items(), version=0)
        assert ids_of(sampler.generate(MANY, step=0, version=0)) == answers
        assert held(hosts.site(), sampler, 0) < 1e-3
        assert not sampler.events
    for host in hosts.live:
        assert host.posts.count(SAMPLE_PATH) >= 1 and host.posts.count(WEIGHTS_PATH) == 1


def test_a_server_that_dies_hands_its_work_to_the_others(
    hosts: Hosts, answers: list[list[int]]
) -> None:
    slow = hosts.start(EngineOptions(slow_s=2.0))
    hosts.start()

    def kill() -> None:
        wait_until(lambda: slow.engine.running)
        slow.stop()

    with hosts.site().sampler(batch_size=3) as sampler:
        sampler.load_weights(hosts.model.weights(0).items(), version=0)
        killer = threading.Thread(target=kill)
        killer.start()
        assert ids_of(sampler.generate(MANY, step=0, version=0)) == answers
        killer.join()
        assert sampler.events["connect"] + sampler.events["reset"] >= 1
        # the probe is of those that are there
        assert sampler.probe(np.arange(5, 20)).shape == (1, 14)


@pytest.mark.parametrize("mode", ["files", "broadcast"])
def test_a_server_that_was_restarted_gets_the_weights_before_it_is_asked(
    hosts: Hosts, mode: Mode, answers: list[list[int]]
) -> None:
    hosts.start()
    with hosts.site().sampler(mode) as sampler:
        sampler.load_weights(hosts.model.weights(0).items(), version=0)
        hosts.restart(0)
        assert ids_of(sampler.generate(MANY, step=0, version=0)) == answers
        assert held(hosts.site(), sampler, 0) < 1e-3
        hosts.restart(0)
        assert held(hosts.site(), sampler, 0) < 1e-3
        assert hosts.live[0].posts[:2] in (
            [WEIGHTS_PATH, LOGPROBS_PATH],
            [LOGPROBS_PATH, WEIGHTS_PATH],
        )


def test_a_server_that_missed_an_update_is_repaired(hosts: Hosts) -> None:
    hosts.start()
    hosts.start()
    with hosts.site().sampler() as sampler:
        sampler.load_weights(hosts.model.weights(0).items(), version=0)
        hosts.live[1].stop()
        sampler.load_weights(hosts.model.weights(1).items(), version=1)
        hosts.restart(1)
        deadline = time.monotonic() + 20.0
        while sampler.probe(np.arange(5, 20)).shape[0] < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert held(hosts.site(), sampler, 1) < 1e-3


def test_exhaustion_is_told_within_the_budget(hosts: Hosts) -> None:
    hosts.start()
    with hosts.site().sampler(fleet=IMPATIENT) as sampler:
        sampler.load_weights(hosts.model.weights(0).items(), version=0)
        hosts.live[0].stop()
        for call in (
            lambda: sampler.generate(PROMPTS, step=0, version=0),
            lambda: sampler.probe(np.arange(5, 20)),
        ):
            with pytest.raises(SamplerError, match=r"no server answered in .*restart_budget_s"):
                call()


def test_an_answer_that_overlaps_an_update_is_thrown_away(
    hosts: Hosts, answers: list[list[int]]
) -> None:
    """The engine does not wait for what is running, so tokens of two versions are in one answer."""
    engine = hosts.start(EngineOptions(slow_s=0.5, waits=False)).engine
    with hosts.site().sampler() as mine, hosts.site().sampler() as other:
        mine.load_weights(hosts.model.weights(0).items(), version=0)

        def overwrite() -> None:
            wait_until(lambda: engine.running)
            other.load_weights(hosts.model.weights(1).items(), version=0)
            engine.options.slow_s = 0.0

        stranger = threading.Thread(target=overwrite)
        stranger.start()
        assert ids_of(mine.generate(MANY, step=0, version=0)) == answers
        stranger.join()
        assert mine.events["version"] >= 1


def test_two_runs_on_one_server_are_told_apart(hosts: Hosts) -> None:
    hosts.start()
    with hosts.site().sampler() as mine, hosts.site().sampler() as other:
        mine.load_weights(hosts.model.weights(0).items(), version=0)
        with pytest.raises(SamplerError, match="another run keeps loading its own weights"):
            for version in range(10):
                other.load_weights(hosts.model.weights(1).items(), version=version)
                mine.generate(PROMPTS, step=0, version=0)


def test_a_replica_that_does_not_push_waits_for_the_one_that_does(
    hosts: Hosts, answers: list[list[int]]
) -> None:
    hosts.start()
    lead = {"session": "0123456789"}
    follow = {"sync": {**lead, "pushes": False}, "fleet": {"patience_s": 30.0}}
    with hosts.site().sampler(sync=lead) as first, hosts.site().sampler(**follow) as second:
        second.load_weights(hosts.model.weights(0).items(), version=0)
        late = threading.Timer(
            0.2, lambda: first.load_weights(hosts.model.weights(0).items(), version=0)
        )
        late.start()
        assert ids_of(second.generate(MANY, step=0, version=0)) == answers
        late.join()
    assert hosts.live[0].posts.count(WEIGHTS_PATH) == 1


def test_a_replica_repairs_what_nobody_else_does(hosts: Hosts, answers: list[list[int]]) -> None:
    hosts.start()
    sync = {"session": "0123456789", "pushes": False}
    with hosts.site().sampler("broadcast", sync=sync, fleet={"patience_s": 0.1}) as sampler:
        sampler.load_weights(hosts.model.weights(0).items(), version=0)
        assert ids_of(sampler.generate(MANY, step=0, version=0)) == answers


def test_log_probabilities_of_another_temperature_are_refused(hosts: Hosts) -> None:
    hosts.start(EngineOptions(logprobs_mode="raw_logprobs"))
    with pytest.raises(SamplerError, match="--logprobs-mode processed_logprobs"):
        hosts.site().sampler(temperature=0.7).__enter__()
    with hosts.site().sampler(temperature=1.0):  # there both are the same
        pass


def test_servers_that_cannot_sample_are_refused_at_the_start(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StubServer(lambda ids: np.zeros(0)) as stock:
        site = Site(urls=(stock.url,), model=hosts.model, root=hosts.root)
        with pytest.raises(SamplerError, match="--worker-extension-cls mopd"):
            site.sampler().__enter__()
    hosts.start()
    with pytest.raises(SamplerError, match="serves 'made-up' and not 'another'"):
        hosts.site().sampler(server={"served_model": "another"}).__enter__()
    monkeypatch.setenv(TOKEN_VARIABLE, "a-token-of-enough-length")
    hosts.restart(0)
    with pytest.raises(SamplerError, match=r"set backend\.api_key_env"):
        hosts.site().sampler().__enter__()
    with hosts.site().sampler(server={"api_key_env": TOKEN_VARIABLE}) as sampler:
        sampler.load_weights(hosts.model.weights(0).items(), version=0)
        assert held(hosts.site(), sampler, 0) < 1e-3


def test_several_http_processes_are_refused(hosts: Hosts) -> None:
    hosts.start(EngineOptions(processes=2))
    with pytest.raises(SamplerError, match="--api-server-count 1"):
        hosts.site().sampler(server={"start_s": 3600.0}).__enter__()


def test_prompts_without_room_for_an_answer_are_refused(hosts: Hosts) -> None:
    hosts.start(EngineOptions(max_length=20))
    with hosts.site().sampler() as sampler:
        sampler.load_weights(hosts.model.weights(0).items(), version=0)
        with pytest.raises(SamplerError, match=r"rollout.max_new_tokens=12: prompt 0 has \d+"):
            sampler.generate(prompts_of("bo ka vi bo ka vi bo ka vi"), step=0, version=0)


def test_answers_under_cached_prompts_would_be_noticed(hosts: Hosts) -> None:
    """The probe reads no cache, so that the reset is what keeps old prompts out."""
    hosts.start(EngineOptions(forgets=False))
    with hosts.site().sampler() as sampler:
        greedy = []
        for version in range(3):
            sampler.load_weights(hosts.model.weights(version).items(), version=version)
            assert held(hosts.site(), sampler, version) < 1e-3
            greedy.append(sampler.answer(PROMPTS)[0].logprobs[0])
        assert greedy[0] == greedy[1] == greedy[2]


def test_only_the_last_two_directories_are_kept(hosts: Hosts) -> None:
    hosts.start()
    with hosts.site().sampler(sync={"session": "0123456789"}) as sampler:
        for version in (1, 2, 9, 10):
            sampler.load_weights(hosts.model.weights(version).items(), version=version)
        found = sorted(path.name for path in (hosts.root / "0123456789").iterdir())
        assert found == ["10", "9"]
