"""Ascend NPUs through torch_npu, which is imported only where it is installed.

Every torch_npu name that mopd uses stands in this file; a test looks each of them up in the
published wheel, and in the table of docs/devices.md.

megatron-core says `cuda` in many places. torch_npu's `transfer_to_npu` points those names at the
NPU, torch-wide. MindSpeed's adaptor imports it and replaces functions of megatron-core as well, by
ones of its own. Both must come before megatron-core is imported, which takes some of the names
along; `mopd.student` sees to it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch

from mopd.device.base import import_quietly, sees_npu
from mopd.device.tensor_types import TYPE_CHECKS, RenamedTypes, run_inside
from mopd.environment import flag, visible_devices
from mopd.errors import ConfigError

MINDSPEED_VARIABLE = "MOPD_MINDSPEED"
REDIRECTION = "torch_npu.contrib.transfer_to_npu"
MINDSPEED = "mindspeed.megatron_adaptor"

log = logging.getLogger(__name__)


def _npu() -> Any:
    """torch_npu.npu, the NPU's counterpart of torch.cuda."""
    import torch_npu  # pyright: ignore[reportMissingImports]

    return torch_npu.npu


def is_available() -> bool:
    """Whether torch_npu, which must be installed, shows an NPU to this process."""
    return bool(_npu().is_available())


def adapt_imports() -> None:
    """Before megatron-core is imported: where this process sees an NPU, load what redirects it.

    MindSpeed's adaptor where MindSpeed is installed, unless `MOPD_MINDSPEED=0`; else torch_npu's
    own redirection. Does nothing elsewhere, and the second time.

    Raises:
        ConfigError: megatron-core was imported without it.
    """
    if REDIRECTION in sys.modules or not sees_npu():
        return
    if "megatron.core" in sys.modules:
        raise ConfigError(
            f"run.device: megatron-core was imported before {REDIRECTION}, so it would ask for "
            f"CUDA; import mopd.student, or {REDIRECTION}, first"
        )
    if importlib.util.find_spec("mindspeed") is None:
        import_quietly(REDIRECTION)
        log.info("npu: %s redirects megatron-core", REDIRECTION)
        return
    if not flag(MINDSPEED_VARIABLE, os.environ, default=True):
        import_quietly(REDIRECTION)
        log.info("npu: MindSpeed is left alone (%s), not imported", MINDSPEED_VARIABLE)
        return
    with _no_arguments():
        import_quietly(MINDSPEED)
    log.warning(
        "npu: %s of MindSpeed %s changes megatron-core %s, which must be the release it was made "
        "for; %s=0 leaves it out",
        *(MINDSPEED, _version("mindspeed"), _version("megatron-core"), MINDSPEED_VARIABLE),
    )


@contextmanager
def _no_arguments() -> Iterator[None]:
    """MindSpeed's adaptor reads Megatron's options from the command line as it is imported."""
    kept = sys.argv
    sys.argv = kept[:1]
    try:
        yield
    finally:
        sys.argv = kept


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of unknown version"


class NpuDevice:
    """One NPU per process, HCCL between them."""

    name = "npu"
    dist_backend = "hccl"

    def __init__(self) -> None:
        if importlib.util.find_spec("torch_npu") is None:
            raise ConfigError(
                "run.device: npu needs torch_npu, which is not installed; pip install "
                "'mopd[npu]' (the release of this torch version), or set run.device=cpu"
            )
        if not is_available():
            raise ConfigError(
                "run.device: torch_npu sees no NPU; check the driver and "
                f"{visible_devices(self.name)}, or set run.device=cpu"
            )

    def device(self, local_rank: int) -> torch.device:
        return torch.device("npu", local_rank)

    def set_device(self, local_rank: int) -> None:
        count = _npu().device_count()
        if local_rank >= count:
            raise ConfigError(
                f"run.device: local rank {local_rank} needs an NPU of its own and this host shows "
                f"{count}; start at most {count} processes per host"
            )
        _npu().set_device(local_rank)

    def current_device(self) -> torch.device:
        return torch.device("npu", _npu().current_device())

    def synchronize(self) -> None:
        _npu().synchronize()

    def empty_cache(self) -> None:
        _npu().empty_cache()

    def memory_stats(self) -> dict[str, int]:
        return {
            "allocated": _npu().memory_allocated(),
            "peak": _npu().max_memory_allocated(),
        }

    def supports_bf16(self) -> bool:
        return bool(_npu().is_bf16_supported())

    def rng_state(self) -> torch.Tensor:
        return _npu().get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        _npu().set_rng_state(state)

    def prepare_megatron(self) -> None:
        """See `adapt_imports`; and NPU tensors pass for CUDA's in megatron's type checks."""
        adapt_imports()
        run_inside(TYPE_CHECKS, lambda: RenamedTypes("torch.npu."))
