"""A sampler and a scorer around transformers in one process, in turn on one device."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mopd.demo import World
from mopd.errors import MopdError
from mopd.serving import hf_sampler, hf_server, hf_turns
from mopd.serving.hf_scorer import TransformersScorer
from mopd.serving.lease import DeviceLease
from mopd.serving.offload import Offloaded
from mopd.serving.scoring import SCORE_PATH, RequestError, ScoredSequence, ScoreRequest
from mopd.serving.wire import encode_rows
from tests.helpers.plain_model import PlainModel
from tests.helpers.small_server import wait_until
from tests.unit.serving.test_hf_sampler import CPU, TASKS, Desk, check_alike
from tests.unit.serving.test_hf_server import asking

SCORED = ScoreRequest(
    request="r",
    sequences=(ScoredSequence(ids=np.arange(5, 20, dtype=np.int32), start=1),),
    top_k=5,
    temperature=1.0,
    vocab_size=50,
    wire="fp32",
)


class Copied(Offloaded):
    """Weights on the device are a copy, as on an accelerator."""

    def load(self) -> None:
        super().load()
        for tensor in self._host:
            tensor.data = tensor.data.clone()


@pytest.fixture(scope="module")
def model(tiny_world: World) -> PlainModel:
    return PlainModel(tiny_world.student)


class Pool:
    """Two engines and somebody else, all with an object of their own for one lease."""

    def __init__(self, model: PlainModel, root: Path) -> None:
        path = root / "pool.lease"
        self.other = DeviceLease(path, owner="other")
        self.desk = Desk(model, root / "weights", lease=DeviceLease(path, owner="rollout"))
        lease = DeviceLease(path, owner="teachers.a")
        self.scorer = TransformersScorer(model.model_dir, device=CPU, lease=lease)

    def rows(self) -> bytes:
        return encode_rows(self.scorer.score(SCORED), wire="fp32")

    def take_away(self) -> None:
        """Whoever asks next has to bring its weights again."""
        assert self.other.acquire(wait_s=20.0)
        assert all(p.numel() == 0 for p in self.desk.engine._model.parameters())
        assert all(p.numel() == 0 for p in self.scorer._model.parameters())

    def close(self) -> None:
        self.other.release()
        self.desk.engine.close()
        self.scorer.close()


@pytest.fixture
def pool(model: PlainModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    monkeypatch.setattr(hf_turns, "Offloaded", Copied)
    pool = Pool(model, tmp_path)
    yield pool
    pool.close()


def test_both_answer_as_if_alone_and_updates_last(
    pool: Pool, model: PlainModel, tmp_path: Path
) -> None:
    alone = Desk(model, tmp_path / "alone")
    plain = TransformersScorer(model.model_dir, device=CPU)
    wanted_rows = encode_rows(plain.score(SCORED), wire="fp32")
    for step in range(2):
        weights = model.weights(step)
        alone.update(weights, step=step)
        _, wanted = alone.sample(TASKS)
        before = pool.desk.engine.facts().version
        pool.take_away()
        with ThreadPoolExecutor(2) as threads:  # while somebody else has the device
            update = threads.submit(pool.desk.update, weights, step=step)
            rows = threads.submit(pool.rows)
            wait_until(lambda: len(list((tmp_path / "pool.lease.queue").glob("[0-9]*"))) == 2)
            assert pool.desk.engine.facts().version == before and not update.done()
            pool.other.release()
            assert rows.result(30.0) == wanted_rows
            assert pool.desk.engine.facts().version in (before, update.result(30.0))
        for _ in range(2):  # the second time after they were away
            version, answers = pool.desk.sample(TASKS)
            assert version == update.result()
            check_alike(answers, wanted)
            assert pool.rows() == wanted_rows  # those of the files, as its fingerprint says
            pool.take_away()
            pool.other.release()


def test_they_come_on_beside_each_other(pool: Pool, model: PlainModel) -> None:
    pool.desk.update(model.weights(0))
    _, wanted = pool.desk.sample(TASKS)
    wanted_rows, failures = pool.rows(), []

    def ask(number: int) -> None:
        try:
            for _ in range(3):
                if number % 2:
                    assert pool.rows() == wanted_rows
                else:
                    check_alike(pool.desk.sample(TASKS)[1], wanted)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert failures == [] and not any(thread.is_alive() for thread in threads)


def test_an_update_that_fails_half_way_is_mended_by_the_next(
    pool: Pool, model: PlainModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.desk.update(model.weights(0))
    with monkeypatch.context() as broken:

        def some(path: Path) -> Iterator[tuple[str, Tensor]]:
            yield from list(model.weights(1).items())[:3]
            raise OSError("the directory has gone")

        broken.setattr(hf_sampler, "read_weights", some)
        with pytest.raises(RequestError, match="tensors did not come"):
            pool.desk.update(model.weights(1), step=1)
    for _ in range(2):
        assert pool.desk.engine.facts().version is None
        assert pool.desk.sample(TASKS, version="0123456789/0") == (None, [])
        pool.take_away()  # and no turn is held
        pool.other.release()
    weights = model.weights(1)
    pool.desk.update(weights, step=2)
    pool.take_away()
    pool.other.release()
    ids = list(range(5, 30))
    wanted = model.scores(weights, ids)
    np.testing.assert_allclose(pool.desk.logprobs(ids), wanted, atol=1e-4)


def test_who_waits_for_a_turn_ends_with_the_engine(pool: Pool, model: PlainModel) -> None:
    version = pool.desk.update(model.weights(0))
    pool.take_away()
    with ThreadPoolExecutor(2) as threads:
        waiting: list[Any] = [threads.submit(pool.desk.sample, TASKS, version=version)]
        waiting.append(threads.submit(pool.rows))
        wait_until(lambda: pool.other.is_wanted())
        pool.desk.engine.close()
        pool.scorer.close()
        for one in waiting:
            with pytest.raises(MopdError, match="is being closed"):
                one.result(10.0)
    assert not pool.other.is_wanted()


def test_a_server_that_closes_waits_for_nobody_who_waits_for_a_turn(
    model: PlainModel, tmp_path: Path
) -> None:
    path = tmp_path / "pool.lease"
    other = DeviceLease(path, owner="other")
    assert other.acquire(wait_s=1.0)
    before = {one.ident for one in threading.enumerate()}
    server = hf_server.open_server(
        model.model_dir,
        host="127.0.0.1",
        port=0,
        token=None,
        device=CPU,
        samples=False,
        scores=True,
        lease=DeviceLease(path, owner="a"),
    )
    server.start()
    body = {"request": "r", "sequences": [{"ids": [5, 6, 7], "start": 1}], "top_k": 2}
    body |= {"temperature": 1.0, "vocab_size": 50, "wire": "fp32"}
    clients = [asking(server, SCORE_PATH, json.dumps(body).encode()) for _ in range(3)]
    assert isinstance(server.scorer, TransformersScorer)
    turns = server.scorer._taking_turns._turns
    assert turns is not None
    wait_until(lambda: len(turns._waiting) == len(clients))
    server.close()
    # not one after the other at the end of its own patience
    assert {one.ident for one in threading.enumerate()} <= before
    for client in clients:
        client.close()
    other.release()


def test_an_engine_that_cannot_be_built_leaves_the_lease(
    model: PlainModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(model: Any, device: torch.device) -> int:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(hf_sampler, "_bytes_per_token", no_room)
    path = tmp_path / "pool.lease"
    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="out of memory"):
        hf_server.open_server(
            model.model_dir,
            host="127.0.0.1",
            port=0,
            token=None,
            device=CPU,
            samples=True,
            scores=True,
            lease=DeviceLease(path, owner="a"),
        )
    assert set(threading.enumerate()) <= before
    other = DeviceLease(path, owner="b")
    assert other.acquire(wait_s=1.0)
    other.release()
