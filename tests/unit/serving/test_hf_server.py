"""One server around transformers: which paths it has, who may ask, and how it ends."""

from __future__ import annotations

import http.client
import json
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mopd.demo import World
from mopd.errors import ConfigError
from mopd.serving import hf_sampler
from mopd.serving.channel import receive
from mopd.serving.hf_server import open_server
from mopd.serving.sampling import (
    LOGPROBS_PATH,
    SAMPLE_PATH,
    WEIGHTS_PATH,
    SampleOptions,
    SampleRequest,
    SampleTask,
    Update,
    encode_request,
    encode_update,
)
from mopd.serving.score_server import HEALTH_PATH, ScoreServer
from mopd.serving.scoring import MODEL_PATH, SCORE_PATH
from mopd.serving.weight_files import write_weights
from mopd.serving.wire import decode
from tests.helpers.hf_host import hf_host
from tests.helpers.plain_model import PlainModel
from tests.helpers.samplers import PROMPTS, Site

TOKEN = "a-token-of-enough-length"
WAIT_S = 30.0
IDS = list(range(5, 25))


@pytest.fixture(scope="module")
def model(tiny_world: World) -> PlainModel:
    return PlainModel(tiny_world.student)


def opened(model: PlainModel, *, port: int = 0, **changes: Any) -> ScoreServer:
    known: dict[str, Any] = {"host": "127.0.0.1", "token": None, "samples": True, "scores": False}
    device = torch.device("cpu")
    return open_server(model.model_dir, port=port, device=device, **(known | changes))


def call(
    server: ScoreServer, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=WAIT_S)  # type: ignore[arg-type]
    try:
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def update(model: PlainModel, root: Path, seed: int) -> tuple[str, bytes]:
    version, size = f"{secrets.token_hex(8)}/{seed}", model.tokenizer.vocabulary.size
    path = write_weights(root, version, model.weights(seed))
    found = Update(version=version, vocab_size=size, deadline_s=WAIT_S, path=str(path))
    return version, encode_update(found)


def samples(model: PlainModel, version: str, **changes: Any) -> bytes:
    size = model.tokenizer.vocabulary.size
    known = {"max_tokens": 8, "temperature": 1.0, "vocab_size": size, "eos_id": 2} | changes
    tasks = (SampleTask(ids=IDS, seed=1),)
    request = SampleRequest(version=version, options=SampleOptions(**known), tasks=tasks)
    return encode_request(request)


def scored(server: ScoreServer, size: int) -> tuple[int, bytes]:
    wanted = {"request": "r", "sequences": [{"ids": IDS, "start": 1}], "top_k": 4}
    wanted |= {"temperature": 1.0, "vocab_size": size, "wire": "fp32"}
    return call(server, "POST", SCORE_PATH, json.dumps(wanted).encode())


@pytest.mark.parametrize(("samples_", "scores"), [(True, False), (False, True), (True, True)])
def test_a_server_has_the_paths_it_was_opened_for(
    model: PlainModel, tmp_path: Path, samples_: bool, scores: bool
) -> None:
    """Scores go on being those of the files, whatever is sampled from."""
    size = model.tokenizer.vocabulary.size
    with opened(model, samples=samples_, scores=scores) as server:
        server.start()
        assert call(server, "GET", HEALTH_PATH) == (200, b"{}")
        status, before = scored(server, size)
        assert status == (200 if scores else 404)
        assert call(server, "GET", MODEL_PATH)[0] == (200 if scores else 404)
        version, body = update(model, tmp_path, 1)
        status, _ = call(server, "POST", WEIGHTS_PATH, body)
        assert status == (200 if samples_ else 404)
        for path, words in (
            (SAMPLE_PATH, samples(model, version)),
            (LOGPROBS_PATH, json.dumps({"ids": IDS}).encode()),
        ):
            status, said = call(server, "POST", path, words)
            assert status == (200 if samples_ else 404)
            if samples_:
                assert json.loads(said)["version"] == version
                assert call(server, "GET", path)[0] == 405
        if scores:
            rows = [
                decode(data, max_bytes=1 << 20).rows for data in (before, scored(server, size)[1])
            ]
            assert rows[0].logprobs.tolist() == rows[1].logprobs.tolist()
        server.close()


def test_every_path_but_health_needs_the_token(model: PlainModel, tmp_path: Path) -> None:
    _, body = update(model, tmp_path, 0)
    with hf_host(model.model_dir, token=TOKEN) as server:
        assert call(server, "GET", HEALTH_PATH)[0] == 200
        for headers in ({}, {"Authorization": TOKEN}, {"Authorization": f"Bearer {TOKEN}x"}):
            for method, path in (("POST", WEIGHTS_PATH), ("GET", WEIGHTS_PATH)):
                assert call(server, method, path, body, **headers)[0] == 401
        good = {"Authorization": f"Bearer {TOKEN}"}
        assert json.loads(call(server, "GET", WEIGHTS_PATH, **good)[1])["version"] is None
        assert call(server, "POST", WEIGHTS_PATH, body, **good)[0] == 200
    for wrong in ({"host": "0.0.0.0"}, {"token": "short"}):
        with pytest.raises(ConfigError, match="token"):
            opened(model, **wrong)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (SAMPLE_PATH, b"{}", 400),
        (SAMPLE_PATH, b"nonsense", 400),
        (LOGPROBS_PATH, b'{"ids": []}', 400),
        (LOGPROBS_PATH, b'{"ids": [-1]}', 400),
        (WEIGHTS_PATH, b'{"version": 7}', 400),
    ],
)
def test_a_wrong_request_is_refused_and_the_engine_lives(
    model: PlainModel, path: str, body: bytes, status: int
) -> None:
    with hf_host(model.model_dir) as server:
        answered, data = call(server, "POST", path, body)
        assert (answered, "error" in json.loads(data)) == (status, True)
        assert call(server, "POST", LOGPROBS_PATH, json.dumps({"ids": IDS}).encode())[0] == 200


class Stopped:
    """Holds the engine's second pass until it is let go, and counts them."""

    def __init__(self, server: ScoreServer) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        self.passes = 0
        sampler: Any = server.sampler
        sampler._model.register_forward_hook(self._pass)

    def _pass(self, *_: Any) -> None:
        self.passes += 1
        if self.passes == 2:
            self.reached.set()
            self.go.wait(WAIT_S)


def asking(server: ScoreServer, path: str, body: bytes) -> socket.socket:
    """A client that has sent its request."""
    client = socket.create_connection(server.server_address[:2])  # type: ignore[arg-type]
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


def test_a_client_that_leaves_takes_its_work_with_it(model: PlainModel, tmp_path: Path) -> None:
    with hf_host(model.model_dir) as server:
        version, body = update(model, tmp_path, 0)
        assert call(server, "POST", WEIGHTS_PATH, body)[0] == 200
        stopped = Stopped(server)
        words = samples(model, version, max_tokens=200, eos_id=model.tokenizer.eos_id)
        client = asking(server, SAMPLE_PATH, words)
        assert stopped.reached.wait(WAIT_S)
        client.close()
        stopped.go.set()
        assert call(server, "POST", SAMPLE_PATH, samples(model, version, max_tokens=1))[0] == 200
        assert stopped.passes == 3  # two of the client that left, and this one


def mopd_threads() -> set[threading.Thread]:
    return set(threading.enumerate())


@pytest.mark.parametrize("busy", [False, True])
def test_a_closed_server_leaves_no_thread_and_its_port_at_once(
    model: PlainModel, tmp_path: Path, busy: bool
) -> None:
    before = mopd_threads()
    server = opened(model)
    server.start()
    version, body = update(model, tmp_path, 0)
    assert call(server, "POST", WEIGHTS_PATH, body)[0] == 200
    idle = http.client.HTTPConnection(*server.server_address[:2])  # type: ignore[arg-type]
    idle.request("GET", WEIGHTS_PATH)
    assert idle.getresponse().read()  # and stays connected
    clients = []
    if busy:
        stopped = Stopped(server)
        clients = [asking(server, SAMPLE_PATH, samples(model, version, max_tokens=200))]
        assert stopped.reached.wait(WAIT_S)
        clients += [asking(server, SAMPLE_PATH, samples(model, version)) for _ in range(3)]
        threading.Timer(0.2, stopped.go.set).start()
    server.close()
    server.close()
    assert not {thread for thread in mopd_threads() - before if "Timer" not in thread.name}
    with opened(model, port=server.server_address[1]) as again:
        again.start()
        assert call(again, "GET", HEALTH_PATH)[0] == 200
        again.close()
    for connection in (idle, *clients):
        connection.close()


def test_an_address_that_is_taken_is_one_line(model: PlainModel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1 port {port}: .*choose"):
            opened(model, port=port)


@pytest.fixture
def outside() -> Iterator[str]:
    """An address of this machine that other machines would use."""
    for found in psutil.net_if_addrs().values():
        for one in found:
            if one.family == socket.AF_INET and not one.address.startswith("127."):
                yield one.address
                return
    pytest.skip("this machine has no address but loopback")


@pytest.mark.parametrize("mode", ["files", "broadcast"])
def test_a_trainer_reaches_a_server_at_an_outside_address(
    model: PlainModel, tmp_path: Path, outside: str, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broadcast's store is where the server can reach it, and the token goes along."""
    monkeypatch.setenv("MOPD_TEST_TOKEN", TOKEN)
    trainers: list[str] = []

    def received(*args: Any, meeting: tuple[str, int], **options: Any) -> Any:
        trainers.append(meeting[0])
        return receive(*args, meeting=meeting, **options)

    monkeypatch.setattr(hf_sampler, "receive", received)
    with hf_host(model.model_dir, host=outside, token=TOKEN) as server:
        site = Site(urls=(server.url,), model=model, root=tmp_path)
        with site.sampler(mode, server={"api_key_env": "MOPD_TEST_TOKEN"}) as sampler:
            sampler.load_weights(model.weights(0).items(), version=0)
            found = sampler.generate(PROMPTS, step=0, version=0)
            assert not sampler.events
    assert trainers == ([outside] if mode == "broadcast" else [])
    ids = [*found[0].prompt_ids.tolist(), *found[0].token_ids.tolist()]
    wanted = model.scores(model.weights(0), ids)[-len(found[0].logprobs) :]
    assert found[0].logprobs == pytest.approx(wanted, abs=1e-3)


def test_what_is_under_way_when_a_server_closes_is_over_soon(model: PlainModel) -> None:
    """A broadcast whose trainer never begins would hold its thread for the whole deadline."""
    before = mopd_threads()
    server = opened(model)
    server.start()
    size = model.tokenizer.vocabulary.size
    specs = [[n, "float32", list(t.shape)] for n, t in model.weights(0).items()]
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"host": "127.0.0.1", "port": store.port, "first_rank": 1, "world_size": 2}
    meeting |= {"backend": "gloo", "tensors": specs}
    body = {"version": "0123456789/0", "vocab_size": size, "deadline_s": 600.0, "path": None}
    client = asking(server, WEIGHTS_PATH, json.dumps(body | {"broadcast": meeting}).encode())
    deadline = time.monotonic() + WAIT_S
    while not store.check(["ready/1"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    own = mopd_threads() - before
    assert len(own) == 2  # the one that serves, and the one that waits
    server.close()
    assert not own & mopd_threads()
    client.close()
