"""Tensors from the trainer (rank 0) to the workers of inference servers, over a group of their own.

The group lives for one update: who was restarted in between needs no care, and a member that fails
takes nothing with it. Members meet in a store on the trainer, announce themselves there, and the
group is formed only when all have come, so that a server that refuses ends the wait early.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroup, Store, TCPStore

from mopd.serving.address import address_towards

TRAINER = 0
GLANCE_S = 0.02
CONNECT_S = 5.0
GO = "go"
Backend = Literal["gloo", "nccl"]
Spec = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


class ChannelError(RuntimeError):
    """The group did not form, or broke."""


def local_address(url: str) -> str:
    """The address of this machine that connections to the server at ``url`` leave from.

    It is asked of a connection, and not of the routes: a name may have several addresses, of which
    the server listens on one. Loopback stays loopback. Blocks for up to `CONNECT_S` an address.

    Raises:
        ChannelError: nothing listens there.
    """
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname, port), timeout=CONNECT_S) as probe:
            return probe.getsockname()[0]
    except OSError as error:
        raise ChannelError(f"{url}: no way to its host ({error})") from error


def dtype_name(tensor: Tensor) -> str:
    """As in `Spec`."""
    return str(tensor.dtype).removeprefix("torch.")


class TrainerChannel:
    """Rank 0. ``with TrainerChannel(...) as channel``: members may come as soon as it exists.

    Args:
        host: address to listen on, of those that lead to the members.
        device: that tensors leave from: CUDA's with NCCL, else gloo from the CPU.
    """

    def __init__(
        self, *, host: str, world_size: int, device: torch.device, deadline_s: float
    ) -> None:
        self._host, self._size, self._device = host, world_size, device
        self.backend: Backend = "nccl" if device.type == "cuda" else "gloo"
        self._deadline = time.monotonic() + deadline_s
        self._group: Any = None
        # bound here, since a store left to itself listens on every address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, 0))
            listener.listen()
            self.port: int = listener.getsockname()[1]
            self._store: TCPStore | None = TCPStore(
                host,
                self.port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=deadline_s),
                master_listen_fd=listener.detach(),
            )

    def __enter__(self) -> TrainerChannel:
        return self

    def __exit__(self, *error: object) -> None:
        self._group = self._store = None

    def send(self, tensors: Iterable[Tensor], *, give_up: Callable[[], bool]) -> None:
        """Broadcasts ``tensors`` in order; ``give_up`` is asked while members are missing.

        Raises:
            ChannelError: a member is missing at the deadline, or was lost.
        """
        store = self._store
        assert store is not None
        try:
            names = [_ready(rank) for rank in range(1, self._size)]
            while not store.check(names):
                if give_up():
                    raise ChannelError("a server does not take part")
                if time.monotonic() > self._deadline:
                    raise ChannelError("a worker did not come to the broadcast in time")
                time.sleep(GLANCE_S)
            store.set(GO, "1")
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # this thread has none yet
            # kept until members have had the time to read everything
            self._group = _join(store, TRAINER, self._size, self.backend, self._host, self._left())
            for tensor in tensors:
                _broadcast(self._group, _bytes_of(tensor, self._device), self._left())
        except (RuntimeError, OSError) as error:
            if isinstance(error, ChannelError):
                raise
            raise ChannelError(_line(error)) from error

    def _left(self) -> timedelta:
        return _left(self._deadline)


def receive(
    specs: Sequence[Spec],
    *,
    meeting: tuple[str, int],
    rank: int,
    world_size: int,
    backend: Backend,
    deadline_s: float,
    give_up: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[str, Tensor]]:
    """What rank 0 sends, tensor by tensor, on the CPU (gloo) or the current device (nccl).

    ``give_up`` is asked until the trainer begins.

    Raises:
        ChannelError: at the latest at the deadline.
    """
    host, port = meeting
    deadline = time.monotonic() + deadline_s
    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda")
    try:
        store = _reached(host, port, min(CONNECT_S, deadline_s))
        store.set_timeout(_left(deadline))
        store.set(_ready(rank), "1")
        # polled, for a trainer that gives up closes its store, which ends this at once
        while not store.check([GO]):
            if give_up():
                raise ChannelError("the server is closing")
            if time.monotonic() > deadline:
                raise ChannelError("the trainer did not begin in time")
            time.sleep(GLANCE_S)
        group = _join(store, rank, world_size, backend, address_towards(host), _left(deadline))
        for name, dtype, shape in specs:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            _broadcast(group, tensor.reshape(-1).view(torch.uint8), _left(deadline))
            yield name, tensor
    except (RuntimeError, OSError) as error:
        if isinstance(error, ChannelError):
            raise
        raise ChannelError(_line(error)) from error


def _reached(host: str, port: int, seconds: float) -> TCPStore:
    """The trainer listens before it asks anyone to come: nobody there means that it has gone, or
    that there is no way."""
    try:
        return TCPStore(host, port, timeout=timedelta(seconds=seconds), is_master=False)
    except (RuntimeError, OSError) as error:
        raise ChannelError(
            f"no way to the trainer at {host} port {port}; let this host reach it, or set "
            "rollout.backend.weight_sync=files"
        ) from error


def _join(
    store: Store, rank: int, size: int, backend: Backend, address: str, timeout: timedelta
) -> Any:
    """A group outside torch's registry: both sides may have a default group of their own."""
    store = PrefixStore("mopd", store)
    if backend == "nccl":
        nccl: Any = dist.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = timeout
        return nccl(store, rank, size, options)
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timeout
    # by address: the machine's name may lead nowhere, or to another interface
    options._devices = [gloo.create_device(hostname=address)]
    return gloo(store, rank, size, options)


def _broadcast(group: ProcessGroup, flat: Tensor, timeout: timedelta) -> None:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = TRAINER, 0
    options.timeout = timeout
    work = group.broadcast([flat], options)
    work.wait(timeout)
    if flat.is_cuda:
        torch.cuda.synchronize(flat.device)


def _bytes_of(tensor: Tensor, device: torch.device) -> Tensor:
    """[bytes] of any type: one width on the wire."""
    tensor = tensor.detach().to(device)
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _ready(rank: int) -> str:
    return f"ready/{rank}"


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(deadline - time.monotonic(), 0.001))


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
