"""A transformers model that takes turns: in host memory, and on its device while it is asked."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from mopd.device import get_device
from mopd.serving.lease import DeviceLease
from mopd.serving.models import load_causal_lm
from mopd.serving.offload import Offloaded
from mopd.serving.turns import Turns


class TurnTakingModel:
    """A causal LM within `turn` only; without a lease it is on its device for good.

    Args:
        lease: of the device; None: nobody else is on it.
    """

    def __init__(self, model_dir: Path, *, device: torch.device, lease: DeviceLease | None) -> None:
        self.device = device
        self._turns: Turns | None = None
        self._weights: Offloaded | None = None
        if lease is None:
            self.model: Any = load_causal_lm(model_dir, device=device)
            return
        self._backend = get_device(device.type)
        self.model = load_causal_lm(model_dir, device=device, in_host_memory=True)
        self._weights = Offloaded([self.model], device=device)
        self._turns = Turns(lease, load=self._load, release=self._unload)

    def turn(self) -> AbstractContextManager[None]:
        """The weights are on the device within.

        Raises:
            LeaseTimeout: the device did not come free in time.
        """
        return nullcontext() if self._turns is None else self._turns.turn()

    def keep(self) -> None:
        """Called within a turn that has changed the weights: they are these from now on."""
        if self._weights is not None:
            self._weights.keep()

    def close(self) -> None:
        """Lets go of the device."""
        if self._turns is not None:
            self._turns.close()

    def _load(self) -> None:
        assert self._weights is not None
        self._weights.load()
        self._backend.set_device(self.device.index or 0)  # this thread has none yet
        self._backend.synchronize()  # a device without room says so here

    def _unload(self) -> None:
        assert self._weights is not None
        self._weights.unload()
        self._backend.empty_cache()  # others cannot use what this process's allocator keeps
