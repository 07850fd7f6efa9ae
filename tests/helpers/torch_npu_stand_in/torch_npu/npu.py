"""torch.npu on the host."""

from __future__ import annotations

import os
import resource

import torch

__all__ = [
    "current_device",
    "device_count",
    "empty_cache",
    "get_rng_state",
    "is_available",
    "is_bf16_supported",
    "is_initialized",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "memory_allocated",
    "set_device",
    "set_rng_state",
    "synchronize",
]

default_generators = (torch.Generator(),)
_current = 0


def is_available():
    return device_count() > 0


def is_initialized():
    return True


def device_count():
    return int(os.environ.get("STAND_IN_NPUS", "1"))


def current_device():
    return _current


def set_device(device):
    global _current
    if device >= device_count():
        raise RuntimeError(f"set device {device} of {device_count()}")
    _current = device


def synchronize(device=None):
    del device


def empty_cache():
    pass


def memory_allocated(device=None):
    del device
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def max_memory_allocated(device=None):
    return memory_allocated(device)


def is_bf16_supported(including_emulation=False):
    del including_emulation
    return os.environ.get("STAND_IN_BF16", "1") == "1"


def manual_seed(seed):
    default_generators[0].manual_seed(seed)


def manual_seed_all(seed):
    manual_seed(seed)


def _is_in_bad_fork():
    return False


def get_rng_state(device="npu"):
    del device
    return default_generators[0].get_state()


def set_rng_state(new_state, device="npu"):
    del device
    default_generators[0].set_state(new_state)
