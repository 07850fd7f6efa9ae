"""Tensors from a trainer to workers, over a group that lives for one update."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mopd.serving.channel import (
    ChannelError,
    Spec,
    TrainerChannel,
    dtype_name,
    local_address,
    receive,
)

CPU = torch.device("cpu")
TENSORS = [
    torch.arange(12, dtype=torch.float32).reshape(3, 4),
    torch.arange(5).to(torch.bfloat16),
    torch.full((1,), 7.0, dtype=torch.float16),
    torch.arange(24.0).reshape(4, 6).T,  # not contiguous
]
SPECS: list[Spec] = [(str(n), dtype_name(t), tuple(t.shape)) for n, t in enumerate(TENSORS)]


class Worker(threading.Thread):
    """Takes what comes, or keeps the error."""

    def __init__(self, port: int, rank: int, size: int, *, deadline_s: float = 10.0) -> None:
        super().__init__(daemon=True)
        self._work = (port, rank, size, deadline_s)
        self.found: dict[str, Tensor] = {}
        self.error: ChannelError | None = None
        self.start()

    def run(self) -> None:
        port, rank, size, deadline_s = self._work
        try:
            for name, tensor in receive(
                SPECS,
                meeting=("127.0.0.1", port),
                rank=rank,
                world_size=size,
                backend="gloo",
                deadline_s=deadline_s,
            ):
                self.found[name] = tensor
        except ChannelError as error:
            self.error = error


def channel(size: int, *, deadline_s: float = 10.0) -> TrainerChannel:
    return TrainerChannel(host="127.0.0.1", world_size=size, device=CPU, deadline_s=deadline_s)


def never() -> bool:
    return False


def test_all_workers_get_all_tensors_bit_by_bit() -> None:
    with channel(3) as trainer:
        workers = [Worker(trainer.port, rank, 3) for rank in (1, 2)]
        trainer.send(TENSORS, give_up=never)
        for worker in workers:
            worker.join(10.0)
    for worker in workers:
        assert worker.error is None and list(worker.found) == [name for name, _, _ in SPECS]
        for tensor, (name, _, _) in zip(TENSORS, SPECS, strict=True):
            assert worker.found[name].dtype == tensor.dtype
            assert torch.equal(worker.found[name], tensor)


def test_it_listens_on_the_given_address_alone() -> None:
    import psutil

    with channel(2) as trainer:
        listening = [
            found.laddr.ip
            for found in psutil.Process().net_connections("tcp")
            if found.status == psutil.CONN_LISTEN and found.laddr.port == trainer.port
        ]
    assert listening == ["127.0.0.1"]


def test_the_trainers_address_is_the_one_its_connections_leave_from() -> None:
    """Also where a name has several addresses and the server listens on one of them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert local_address(f"http://127.0.0.1:{port}") == "127.0.0.1"
        assert local_address(f"http://localhost:{port}") == "127.0.0.1"
    for url in (f"http://127.0.0.1:{port}", "http://no-such-host.invalid:8000"):
        with pytest.raises(ChannelError, match="no way to its host"):
            local_address(url)


@pytest.mark.parametrize(
    ("give_up", "message"),
    [(never, "did not come to the broadcast in time"), (lambda: True, "does not take part")],
)
def test_a_worker_that_stays_away_ends_the_wait(give_up: Callable[[], bool], message: str) -> None:
    began = time.monotonic()
    with channel(3, deadline_s=0.5) as trainer:
        worker = Worker(trainer.port, 1, 3, deadline_s=60.0)
        with pytest.raises(ChannelError, match=message):
            trainer.send(TENSORS, give_up=give_up)
    worker.join(30.0)
    assert isinstance(worker.error, ChannelError) and not worker.found
    assert time.monotonic() - began < 30.0  # long before the worker's own deadline


def test_a_trainer_that_goes_away_is_noticed_by_the_worker() -> None:
    with channel(2) as trainer:
        worker = Worker(trainer.port, 1, 2, deadline_s=5.0)
        trainer.send(TENSORS[:2], give_up=never)
    worker.join(10.0)
    assert not worker.is_alive()
    assert isinstance(worker.error, ChannelError) and list(worker.found) == ["0", "1"]


def test_a_worker_gives_up_when_it_is_told_to() -> None:
    """Long before its deadline, while the trainer has not begun."""
    with (
        channel(2, deadline_s=60.0) as trainer,
        pytest.raises(ChannelError, match="the server is closing"),
    ):
        list(
            receive(
                SPECS,
                meeting=("127.0.0.1", trainer.port),
                rank=1,
                world_size=2,
                backend="gloo",
                deadline_s=60.0,
                give_up=lambda: True,
            )
        )


def test_nobody_there() -> None:
    remedy = r"no way to the trainer at 127.0.0.1 port 9; .* rollout.backend.weight_sync=files"
    with pytest.raises(ChannelError, match=remedy):
        list(
            receive(
                SPECS,
                meeting=("127.0.0.1", 9),
                rank=1,
                world_size=2,
                backend="gloo",
                deadline_s=0.5,
            )
        )
