"""What of the student leaves its device while others have it: optimizer state and gradients.

The weights stay: they are what is sent to the sampler. Gradient buffers are freed, as a step begins
with zeros there. Main weights and moments wait in host memory; the numbers do not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from mopd.device import get_device
from mopd.student.model import StudentModel
from mopd.student.optim import inner_optimizers


class StudentState:
    """`away` and `back` in turn; on this rank alone, not collective.

    While it is away the optimizer's state can be read (in host memory), the gradients cannot.
    """

    def __init__(self, model: StudentModel, optimizer: MegatronOptimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._host: dict[Tensor, Tensor] = {}  # by the tensor whose numbers it takes
        self._sizes: dict[int, int] = {}  # of freed gradient buffers, in bytes
        self._device = model.topology.device
        self._backend = get_device(self._device.type)
        self.is_away = False

    @property
    def num_bytes(self) -> int:
        """Of optimizer state and gradient buffers that are on the device now."""
        gradients = [one.untyped_storage().nbytes() for one in self._gradients()]
        others = [one.numel() * one.element_size() for one in self._moved() if self._is_there(one)]
        return sum(gradients) + sum(others)

    def away(self) -> None:
        """Frees the device's memory."""
        if self.is_away:
            return
        self.is_away = True
        self._optimizer.zero_grad()  # references into the buffers, or copies of them
        moved = list(self._moved())
        known = self._host  # pinned memory is slow to get
        self._host = {one: known[one] if one in known else _host_like(one) for one in moved}
        for tensor, host in self._host.items():
            host.copy_(tensor.data, non_blocking=True)
        self._backend.synchronize()  # before the memory that is copied is given back
        for tensor, host in self._host.items():
            tensor.data = host
        for number, gradients in enumerate(self._gradients()):
            self._sizes[number] = gradients.untyped_storage().nbytes()
            gradients.untyped_storage().resize_(0)
        self._backend.empty_cache()  # others cannot use what this process's allocator keeps

    def back(self) -> None:
        """As before `away`, bit by bit; gradients are zero."""
        if not self.is_away:
            return
        self.is_away = False
        for tensor, host in self._host.items():
            tensor.data = torch.empty_like(host, device=self._device).copy_(host, non_blocking=True)
        for number, gradients in enumerate(self._gradients()):
            # parameters and buckets look into this very storage
            gradients.untyped_storage().resize_(self._sizes[number])
            gradients.zero_()
        self._backend.synchronize()

    def _moved(self) -> Iterator[Tensor]:
        """Main weights and moments, without what shares the model's own memory."""
        kept = {
            parameter.data.untyped_storage().data_ptr()
            for chunk in self._model.chunks
            for parameter in chunk.parameters()
        }
        for inner in inner_optimizers(self._optimizer):
            optimizer = inner.optimizer
            mains = [one for group in optimizer.param_groups for one in group["params"]]
            moments = [
                one
                for state in optimizer.state.values()
                for one in state.values()
                if isinstance(one, Tensor)
            ]
            for tensor in (*mains, *moments):
                if tensor.untyped_storage().data_ptr() not in kept:
                    yield tensor

    def _is_there(self, tensor: Tensor) -> bool:
        host = self._host.get(tensor)
        return host is None or host.data_ptr() != tensor.data_ptr()

    def _gradients(self) -> Iterator[Tensor]:
        wrapped: tuple[Any, ...] = tuple(self._model.ddp)  # a Module's own `buffers` is a method
        for ddp in wrapped:
            for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers):
                yield buffer.grad_data


def _host_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor.data, device="cpu", pin_memory=tensor.device.type != "cpu")
