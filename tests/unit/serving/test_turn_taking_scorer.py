"""Transformers engines on one lease: real servers, their weights, and what they answer."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from mopd.serving.hf_scorer import TransformersScorer
from mopd.serving.lease import DeviceLease
from mopd.serving.models import load_causal_lm
from mopd.serving.offload import Offloaded
from mopd.serving.scoring import SCORE_PATH, ScoredSequence, ScoreRequest
from mopd.serving.wire import encode_rows
from tests.dist.student import worlds
from tests.helpers.leased_engine import LeasedProcess, intervals
from tests.helpers.small_server import wait_until

CPU = torch.device("cpu")
SEQUENCES = [{"ids": [1, 2, 3, 4], "start": 1}, {"ids": [9, 8, 7], "start": 2}]
BODY = {"request": "r", "sequences": SEQUENCES, "top_k": 5, "temperature": 1.0}
BODY |= {"vocab_size": 67, "wire": "fp32"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [worlds.make_model(family, root / family) for family in ("llama", "qwen3")]


def request_of(body: dict[str, Any]) -> ScoreRequest:
    import numpy as np

    sequences = tuple(
        ScoredSequence(ids=np.asarray(one["ids"], dtype=np.int32), start=one["start"])
        for one in body["sequences"]
    )
    keys = ("request", "top_k", "temperature", "vocab_size", "wire")
    return ScoreRequest(sequences=sequences, **{key: body[key] for key in keys})


def rows(model: Path, lease: DeviceLease | None = None) -> bytes:
    scorer = TransformersScorer(model, device=CPU, lease=lease)
    try:
        return encode_rows(scorer.score(request_of(BODY)), wire="fp32")
    finally:
        scorer.close()


def post(port: str) -> bytes:
    data = json.dumps(BODY).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{SCORE_PATH}", data=data)
    with urllib.request.urlopen(request, timeout=60.0) as reply:
        return reply.read()


def test_two_servers_take_turns_and_answer_as_if_alone(models: list[Path], tmp_path: Path) -> None:
    """Under constant load of both: never two on the device, both come on, one is killed."""
    alone = [rows(model) for model in models]
    assert alone[0] != alone[1]
    logs = [tmp_path / "a", tmp_path / "b"]
    path = tmp_path / "pool.lease"
    words = [
        ("serve", path, owner, model, 0.2, log)
        for owner, model, log in zip("ab", models, logs, strict=True)
    ]
    with LeasedProcess(*words[0]) as first, LeasedProcess(*words[1]) as second:
        ports = [first.wait(), second.wait()]
        counts, failures, killed = [0, 0], [], threading.Event()

        def keep_asking(number: int) -> None:
            try:
                while not killed.is_set():
                    assert post(ports[number]).endswith(alone[number])
                    counts[number] += 1
            except Exception as error:
                if not (killed.is_set() and number == 0):
                    failures.append(error)

        threads = [threading.Thread(target=keep_asking, args=(n,)) for n in (0, 1, 0, 1)]
        for thread in threads:
            thread.start()

        def both_came_often() -> bool:
            seen = [log.exists() and len(intervals(log)) >= 4 for log in logs]
            return bool(failures) or (all(seen) and min(counts) >= 4)

        wait_until(both_came_often, seconds=60.0)
        # while it has the device, for requests that never end as it is stopped within them
        wait_until(lambda: intervals(logs[0])[-1][1] == float("inf"))
        died = time.monotonic()
        killed.set()
        first.kill()
        for thread in threads:
            thread.join()
        assert failures == []
        assert post(ports[1]).endswith(alone[1])
    assert min(counts) >= 4
    spans = sorted(
        (begin, min(end, died if log is logs[0] else end))
        for log in logs
        for begin, end in intervals(log)
    )
    for (_, end), (begin, _) in pairwise(spans):
        assert end <= begin, "two were on the device"


def test_weights_are_in_host_memory_until_they_are_asked_for(
    models: list[Path], tmp_path: Path
) -> None:
    lease = DeviceLease(tmp_path / "pool.lease", owner="a")
    other = DeviceLease(tmp_path / "pool.lease", owner="b")
    scorer = TransformersScorer(models[0], device=CPU, lease=lease)

    def num_bytes() -> int:
        tensors = [*scorer._model.parameters(), *scorer._model.buffers()]
        return sum(one.numel() * one.element_size() for one in tensors)

    assert num_bytes() == 0
    found = encode_rows(scorer.score(request_of(BODY)), wire="fp32")
    assert found == rows(models[0]) and num_bytes() > 0
    assert other.acquire(wait_s=20.0)
    assert num_bytes() == 0
    other.release()
    scorer.close()


def test_weights_that_were_changed_on_the_device_are_kept(models: list[Path]) -> None:
    model = load_causal_lm(models[0], device=CPU)
    weights = Offloaded([model], device=CPU)
    head = model.lm_head.weight
    with weights.loaded():
        head.data = torch.full_like(head.data, 2.0)  # a copy, as on another device
        weights.keep()
    assert head.numel() == 0
    with weights.loaded():
        assert (head == 2.0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_goes_back_to_the_device(models: list[Path], tmp_path: Path) -> None:
    path, device = tmp_path / "pool.lease", torch.device("cuda", 0)
    torch.zeros(1, device=device)
    before = torch.cuda.memory_reserved(device)
    lease, other = DeviceLease(path, owner="a"), DeviceLease(path, owner="b")
    scorer = TransformersScorer(models[0], device=device, lease=lease)
    assert torch.cuda.memory_reserved(device) == before
    scorer.score(request_of(BODY))
    assert torch.cuda.memory_allocated(device) > 0
    other.acquire(wait_s=20.0)
    # what libraries keep for themselves stays: cuBLAS has a workspace of some MB
    assert torch.cuda.memory_reserved(device) <= before + (64 << 20)
    assert all(one.numel() == 0 for one in scorer._model.parameters())
    other.release()
    scorer.close()
