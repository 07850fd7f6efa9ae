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
    """One kind of device. Methods raise nothing once `get_device` has handed the backend out,
    but for `set_device` and `prepare_megatron`."""

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
        """Make `device(local_rank)` the process's current device. ConfigError where it has none."""
        ...

    def current_device(self) -> torch.device:
        """What `set_device` chose for this process; before it, the first one."""
        ...

    def synchronize(self) -> None:
        """Wait until all work queued on the current device is done."""
        ...

    def empty_cache(self) -> None:
        """Give back the device's memory that no tensor of this process uses."""
        ...

    def memory_stats(self) -> dict[str, int]:
        """Bytes: `allocated` now and `peak` since the start."""
        ...

    def supports_bf16(self) -> bool:
        """Whether the current device computes in bfloat16."""
        ...

    def rng_state(self) -> torch.Tensor | None:
        """State of the current device's generator [bytes] uint8; None where it is the host's."""
        ...

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Put back what `rng_state` gave."""
        ...

    def prepare_megatron(self) -> None:
        """Make megatron-core usable on this device. Idempotent. ConfigError where it cannot."""
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
    """The backend of `run.device`: `auto`, `cpu`, `cuda` or `npu`. Raises ConfigError if absent.

    `auto` is the accelerator that this process sees, else the CPU: what megatron-core uses, too.
    """
    if name == "auto":
        name = _detect()
    backends = _backends()
    if name not in backends:
        raise ConfigError(f"run.device: unknown device {name!r}; use auto, {', '.join(backends)}")
    return backends[name]()


def check_dtype(backend: DeviceBackend, dtype: str) -> None:
    """Raise ConfigError where the device of `student.dtype` cannot compute in it."""
    if dtype == "bfloat16" and not backend.supports_bf16():
        raise ConfigError(
            f"student.dtype: the {backend.name} device of this process has no bfloat16; set "
            "student.dtype=float32"
        )


def sees_npu() -> bool:
    """Whether torch_npu is installed here and shows an NPU to this process."""
    from mopd.device.npu import is_available

    return importlib.util.find_spec("torch_npu") is not None and is_available()


def _detect() -> str:
    # NPUs first: with torch_npu's redirection `torch.cuda` answers for them
    if sees_npu():
        return "npu"
    if torch.cuda.is_available():
        return "cuda"
    return "cpu"


def _backends() -> dict[str, Callable[[], DeviceBackend]]:
    from mopd.device.cpu import CpuDevice
    from mopd.device.cuda import CudaDevice
    from mopd.device.npu import NpuDevice

    return {"cpu": CpuDevice, "cuda": CudaDevice, "npu": NpuDevice}
