"""Ascend NPUs through torch_npu, which is imported only when an NPU is asked for."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch

from mopd.errors import ConfigError


class NpuDevice:
    """One NPU per process, HCCL between them."""

    name = "npu"
    dist_backend = "hccl"

    def __init__(self) -> None:
        if importlib.util.find_spec("torch_npu") is None:
            raise ConfigError(
                "run.device: npu needs torch_npu, which is not installed; install the torch_npu "
                "release of this torch version, or set run.device=cpu"
            )
        if not self._npu().is_available():
            raise ConfigError(
                "run.device: torch_npu sees no NPU; check the driver and "
                "ASCEND_RT_VISIBLE_DEVICES, or set run.device=cpu"
            )

    def device(self, local_rank: int) -> torch.device:
        return torch.device("npu", local_rank)

    def set_device(self, local_rank: int) -> None:
        self._npu().set_device(local_rank)

    def synchronize(self) -> None:
        self._npu().synchronize()

    def memory_stats(self) -> dict[str, int]:
        npu = self._npu()
        return {"allocated": npu.memory_allocated(), "peak": npu.max_memory_allocated()}

    def prepare_megatron(self) -> None:
        """Route megatron-core's CUDA calls to the NPU with torch_npu's own redirection."""
        importlib.import_module("torch_npu.contrib.transfer_to_npu")

    @staticmethod
    def _npu() -> ModuleType:
        return importlib.import_module("torch_npu").npu
