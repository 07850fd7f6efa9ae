"""Weights that lie in host memory, and on their device while they are used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Offloaded:
    """Weights that are in host memory, and on their device within `loaded` only.

    The modules' parameters are empty in between, also where the device is the host itself. The
    host's copy changes in `keep` alone: else nothing is copied back. For an accelerator it is
    pinned, which makes the way to the device asynchronous.

    Args:
        device: where to; buffers go along. None: where each parameter is now, buffers stay.
    """

    def __init__(self, modules: Sequence[nn.Module], *, device: torch.device | None = None) -> None:
        self._host: dict[Tensor, Tensor] = {}
        self._device: dict[Tensor, torch.device] = {}
        for tensor in _tensors(modules, with_buffers=device is not None):
            self._device[tensor] = device or tensor.device
            self._host[tensor] = _to_host(tensor.data, self._device[tensor])
        self.unload()

    @property
    def num_bytes(self) -> int:
        """Of this rank's weights on the device, now."""
        return sum(p.numel() * p.element_size() for p in self._host)

    def load(self) -> None:
        for tensor, host in self._host.items():
            tensor.data = host.to(self._device[tensor], non_blocking=True)

    def unload(self) -> None:
        for tensor, device in self._device.items():
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=device)

    def keep(self) -> None:
        """Takes the weights on the device over into the host's copy: they were changed there."""
        for tensor, host in self._host.items():
            if tensor.data.data_ptr() != host.data_ptr():
                host.copy_(tensor.data)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        try:
            self.load()
            yield
        finally:
            self.unload()


def _tensors(modules: Sequence[nn.Module], *, with_buffers: bool) -> Iterator[Tensor]:
    for module in modules:
        yield from module.parameters()
        if with_buffers:
            yield from module.buffers()


def _to_host(tensor: Tensor, device: torch.device) -> Tensor:
    host = tensor.cpu()
    return host if device.type == "cpu" else host.pin_memory()
