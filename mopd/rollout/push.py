"""How servers get the student's weights: a directory that both sides see, or a broadcast."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mopd.serving.channel import ChannelError, TrainerChannel, dtype_name, local_address
from mopd.serving.http import RetryableError, ServerError
from mopd.serving.sample_server import SampleServer
from mopd.serving.sampling import Broadcast, Update
from mopd.serving.weight_files import write_weights

HOST = torch.device("cpu")


class WeightPush(Protocol):
    """Holds the newest weights, so that a server that lost them can have them again."""

    def take(self, version: str, tensors: Mapping[str, Tensor]) -> None: ...

    async def send(self, servers: Sequence[SampleServer]) -> list[ServerError | None]:
        """Brings the weights to all ``servers``; what went wrong with each."""
        ...


class FilePush:
    """Writes ``<root>/<version>``, and names it to the servers.

    Args:
        writes: whether this replica of the trainer is the one that writes.
    """

    def __init__(self, root: Path, *, vocab_size: int, deadline_s: float, writes: bool) -> None:
        self._root = root.resolve()
        self._vocab_size, self._deadline_s = vocab_size, deadline_s
        self._writes = writes
        self._version = ""

    def take(self, version: str, tensors: Mapping[str, Tensor]) -> None:
        if self._writes:
            write_weights(self._root, version, tensors)
        self._version = version

    async def send(self, servers: Sequence[SampleServer]) -> list[ServerError | None]:
        update = Update(
            version=self._version,
            vocab_size=self._vocab_size,
            deadline_s=self._deadline_s,
            path=str(self._root / self._version),
        )
        return list(await asyncio.gather(*(_told(server.update(update)) for server in servers)))


class BroadcastPush:
    """Keeps the weights in this host's memory and sends them over a group of their own.

    Args:
        device: of the trainer. NCCL joins CUDA devices on both sides, else gloo the hosts.
    """

    def __init__(self, *, vocab_size: int, deadline_s: float, device: torch.device) -> None:
        self._vocab_size, self._deadline_s = vocab_size, deadline_s
        self._device = device
        self._version = ""
        self._tensors: dict[str, Tensor] = {}

    def take(self, version: str, tensors: Mapping[str, Tensor]) -> None:
        self._version, self._tensors = version, dict(tensors)

    async def send(self, servers: Sequence[SampleServer]) -> list[ServerError | None]:
        """One group for all servers that this machine reaches from one of its addresses."""
        found: dict[str, ServerError | None] = {}
        groups: dict[str, list[SampleServer]] = {}
        for server in servers:
            try:
                groups.setdefault(local_address(server.url), []).append(server)
            except ChannelError as error:
                found[server.url] = RetryableError(server.url, "connect", str(error))
        for address, members in groups.items():
            found |= await self._broadcast(address, members)
        return [found[server.url] for server in servers]

    async def _broadcast(
        self, address: str, servers: Sequence[SampleServer]
    ) -> dict[str, ServerError | None]:
        told = await asyncio.gather(*(s.facts() for s in servers), return_exceptions=True)
        found: dict[str, ServerError | None] = {}
        members, workers, devices = [], [], set()
        for server, facts in zip(servers, told, strict=True):
            if isinstance(facts, ServerError):
                found[server.url] = facts
            elif isinstance(facts, BaseException):
                raise facts
            else:
                members.append(server)
                workers.append(facts.workers)
                devices.add(facts.device)
        if members:
            device = self._device if devices == {"cuda"} else HOST
            answers = await self._meet(address, members, workers, device)
            found |= dict(zip([s.url for s in members], answers, strict=True))
        return found

    async def _meet(
        self,
        address: str,
        servers: Sequence[SampleServer],
        workers: Sequence[int],
        device: torch.device,
    ) -> list[ServerError | None]:
        size = 1 + sum(workers)
        with TrainerChannel(
            host=address,
            world_size=size,
            device=device if device.type == "cuda" else HOST,
            deadline_s=self._deadline_s,
        ) as channel:
            answers = [
                asyncio.create_task(
                    _told(server.update(self._update(address, channel, 1 + sum(workers[:n]), size)))
                )
                for n, server in enumerate(servers)
            ]

            def refused() -> bool:
                return any(answer.done() for answer in answers)

            with suppress(ChannelError):  # each server tells it in its own answer
                await asyncio.to_thread(channel.send, self._tensors.values(), give_up=refused)
            return list(await asyncio.gather(*answers))

    def _update(self, address: str, channel: TrainerChannel, first: int, size: int) -> Update:
        return Update(
            version=self._version,
            vocab_size=self._vocab_size,
            deadline_s=self._deadline_s,
            broadcast=Broadcast(
                host=address,
                port=channel.port,
                first_rank=first,
                world_size=size,
                backend=channel.backend,
                tensors=tuple(
                    (name, dtype_name(t), tuple(t.shape)) for name, t in self._tensors.items()
                ),
            ),
        )


async def _told(update: Coroutine[None, None, None]) -> ServerError | None:
    try:
        await update
    except ServerError as error:
        return error
    return None
