"""How servers get the student's weights: a directory that both sides see, or a broadcast."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
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

Taken = tuple[str, dict[str, Tensor]]


class WeightPush(Protocol):
    """Holds the newest weights, so that a server that lost them can have them again."""

    @property
    def version(self) -> str | None:
        """What was taken last."""
        ...

    def take(self, version: str, tensors: Mapping[str, Tensor]) -> None: ...

    async def send(self, servers: Sequence[SampleServer]) -> list[ServerError | None]:
        """Brings the weights to all ``servers``; what went wrong with each.

        `take` may be called by another thread meanwhile.
        """
        ...

    def close(self) -> None:
        """Removes what is left of the weights; safe to call twice."""
        ...


class FilePush:
    """Writes ``<root>/<version>``, and names it to the servers. `close` removes it.

    Args:
        writes: whether this replica of the trainer is the one that writes.
    """

    def __init__(self, root: Path, *, vocab_size: int, deadline_s: float, writes: bool) -> None:
        self._root = root.resolve()
        self._vocab_size, self._deadline_s = vocab_size, deadline_s
        self._writes = writes
        self._made_root = False
        self._written: Path | None = None
        self.version: str | None = None

    def take(self, version: str, tensors: Mapping[str, Tensor]) -> None:
        if self._writes:
            self._made_root |= not self._root.exists()
            self._written = self._root / version  # by half, if this fails
            write_weights(self._root, version, tensors)
        self.version = version

    async def send(self, servers: Sequence[SampleServer]) -> list[ServerError | None]:
        version = self.version
        assert version is not None
        update = Update(
            version=version,
            vocab_size=self._vocab_size,
            deadline_s=self._deadline_s,
            path=str(self._root / version),
        )
        return list(await asyncio.gather(*(_told(server, update) for server in servers)))

    def close(self) -> None:
        if self._written is None:
            return
        shutil.rmtree(self._written.parent, ignore_errors=True)  # of the session
        if self._made_root:
            with suppress(OSError):  # another session is in it
                self._root.rmdir()


class BroadcastPush:
    """Keeps the weights in this host's memory and sends them over a group of their own.

    Args:
        device: of the trainer. NCCL joins CUDA devices on both sides, else gloo the hosts.
    """

    def __init__(self, *, vocab_size: int, deadline_s: float, device: torch.device) -> None:
        self._vocab_size, self._deadline_s = vocab_size, deadline_s
        self._device = device
        self._taken: Taken | None = None

    @property
    def version(self) -> str | None:
        return None if self._taken is None else self._taken[0]

    def take(self, version: str, tensors: Mapping[str, Tensor]) -> None:
        self._taken = version, dict(tensors)

    def close(self) -> None:
        self._taken = None

    async def send(self, servers: Sequence[SampleServer]) -> list[ServerError | None]:
        """One group for all servers that this machine reaches from one of its addresses."""
        taken = self._taken
        assert taken is not None
        found: dict[str, ServerError | None] = {}
        groups: dict[str, list[SampleServer]] = {}
        asked = [asyncio.to_thread(local_address, server.url) for server in servers]
        addresses = await asyncio.gather(*asked, return_exceptions=True)
        for server, address in zip(servers, addresses, strict=True):
            if isinstance(address, ChannelError):
                found[server.url] = RetryableError(server.url, "connect", str(address))
            elif isinstance(address, BaseException):
                raise address
            else:
                groups.setdefault(address, []).append(server)
        for address, members in groups.items():
            found |= await self._broadcast(taken, address, members)
        return [found[server.url] for server in servers]

    async def _broadcast(
        self, taken: Taken, address: str, servers: Sequence[SampleServer]
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
            answers = await self._meet(taken, address, members, workers, device)
            found |= dict(zip([s.url for s in members], answers, strict=True))
        return found

    async def _meet(
        self,
        taken: Taken,
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
            firsts = [1 + sum(workers[:n]) for n in range(len(servers))]
            updates = [self._update(taken, address, channel, first, size) for first in firsts]
            answers = [
                asyncio.create_task(_told(server, update))
                for server, update in zip(servers, updates, strict=True)
            ]

            def refused() -> bool:
                return any(answer.done() for answer in answers)

            try:
                with suppress(ChannelError):  # each server tells it in its own answer
                    await asyncio.to_thread(channel.send, taken[1].values(), give_up=refused)
                return list(await asyncio.gather(*answers))
            finally:
                for answer in answers:  # the thread of a send that is cancelled ends by it
                    answer.cancel()

    def _update(
        self, taken: Taken, address: str, channel: TrainerChannel, first: int, size: int
    ) -> Update:
        return Update(
            version=taken[0],
            vocab_size=self._vocab_size,
            deadline_s=self._deadline_s,
            broadcast=Broadcast(
                host=address,
                port=channel.port,
                first_rank=first,
                world_size=size,
                backend=channel.backend,
                tensors=tuple(
                    (name, dtype_name(t), tuple(t.shape)) for name, t in taken[1].items()
                ),
            ),
        )


async def _told(server: SampleServer, update: Update) -> ServerError | None:
    try:
        await server.update(update)
    except ServerError as error:
        return error
    return None
