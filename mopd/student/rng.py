"""Every random generator of a process, as tensors and JSON."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

from mopd.device import get_device

_TRACKER = "tracker."


def capture_rng() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """States of torch, Megatron's tracker, numpy and python: (tensors, JSON values)."""
    tensors = {"torch": torch.get_rng_state()}
    device = get_device("auto")
    if (own := device.rng_state()) is not None:
        tensors[device.name] = own
    for name, state in _tracker().get_states().items():
        tensors[_TRACKER + name] = state.clone()
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    tensors["numpy"] = torch.tensor(np.asarray(keys, dtype=np.int64))
    version, words, gauss_next = random.getstate()
    tensors["python"] = torch.tensor(words, dtype=torch.int64)
    values = {
        "numpy": [kind, int(position), int(has_gauss), float(gauss)],
        "python": [version, gauss_next],
    }
    return tensors, values


def _tracker() -> CudaRNGStatesTracker:
    tracker = get_cuda_rng_tracker()
    assert tracker is not None
    return tracker


def restore_rng(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    """Undo everything since `capture_rng`."""
    torch.set_rng_state(tensors["torch"])
    device = get_device("auto")
    if device.name in tensors:
        device.set_rng_state(tensors[device.name])
    _tracker().set_states(
        {
            name.removeprefix(_TRACKER): state
            for name, state in tensors.items()
            if name.startswith(_TRACKER)
        }
    )
    kind, position, has_gauss, gauss = values["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((kind, keys, position, has_gauss, gauss))
    version, gauss_next = values["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss_next))


def reseed(seed: int, *, step: int, pp_rank: int) -> None:
    """Seed every generator by the run's seed, the step and the pipeline stage.

    For a checkpoint of another layout, whose generators belong to ranks that are no more. Megatron
    gives tensor-parallel ranks different streams of one seed.
    """
    state = np.random.SeedSequence([seed, step, pp_rank]).generate_state(1)
    number = int(state[0]) >> 1  # numpy takes 32 bits, Megatron adds to it
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
    model_parallel_cuda_manual_seed(number)
