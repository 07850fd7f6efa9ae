"""Stands in for torch_npu where there is no NPU: the names that mopd needs, on the host.

Its names are those of the published wheel, which a test compares. What it keeps of an NPU: devices
are called `npu`, tensor types `torch.npu.*`, groups `hccl`; memory is the host's, and groups are
gloo's. `STAND_IN_NPUS` in the environment is the number of devices.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from torch_npu import npu as npu


def _hccl(options, more):
    del more
    return dist.ProcessGroupGloo(
        options.store, options.group_rank, options.group_size, options.timeout
    )


def _register() -> None:
    torch.utils.rename_privateuse1_backend("npu")
    torch._register_device_module("npu", npu)
    # torch asks its C++ side, where torch_npu's library would have registered itself
    torch._C._get_accelerator = lambda *check: torch.device("cpu")
    # of the host's tensors, too: there are no others here
    dist.Backend.register_backend("hccl", _hccl, extended_api=True, devices=["npu", "cpu"])


def npu_fusion_attention(*args, **kwargs):
    """transformers imports it wherever torch_npu is installed; mopd asks for other attention."""
    raise NotImplementedError


_register()
