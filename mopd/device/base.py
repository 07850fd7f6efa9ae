"""The device seam: the few calls mopd makes, and the choice of an implementation by name."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Protocol

import torch

from mopd.errors import ConfigError


class DeviceBackend(Protocol):
    """One kind of device. Methods raise nothing once `get_device` has handed the backend out."""

    @property
    def name(self) -> str:
        """`cpu`, `cuda` or `npu`, as in `run.device`."""
        ...

    @property
    def dist_backend(self) -> str:
        """The torch.distributed backend of this device."""
        ...

    def device(self, local_rank: int) -> torch.device:
        """The device of the process with this rank on its host."""
        ...

    def set_device(self, local_rank: int) -> None:
        """Make `device(local_rank)` the process's current device."""
        ...

    def synchronize(self) -> None:
        """Wait until all work queued on the current device is done."""
        ...

    def memory_stats(self) -> dict[str, int]:
        """Bytes: `allocated` now and `peak` since the start."""
        ...

    def prepare_megatron(self) -> None:
        """Make megatron-core usable on this device. Idempotent."""
        ...


def import_quietly(*modules: str) -> None:
    """Import modules without their import-time notices.

    megatron-core warns that Transformer Engine and Apex are missing. mopd brings its own layers and
    uses torch's optimizers, so the notices tell a user nothing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modules:
            importlib.import_module(module)


def get_device(name: str) -> DeviceBackend:
    """The backend of `run.device`: `auto`, `cpu`, `cuda` or `npu`. Raises ConfigError if absent."""
    if name == "auto":
        name = _detect()
    backends = _backends()
    if name not in backends:
        raise ConfigError(f"run.device: unknown device {name!r}; use auto, {', '.join(backends)}")
    return backends[name]()


def _detect() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if importlib.util.find_spec("torch_npu") is not None:
        return "npu"
    return "cpu"


def _backends() -> dict[str, Callable[[], DeviceBackend]]:
    from mopd.device.cpu import CpuDevice
    from mopd.device.cuda import CudaDevice
    from mopd.device.npu import NpuDevice

    return {"cpu": CpuDevice, "cuda": CudaDevice, "npu": NpuDevice}
