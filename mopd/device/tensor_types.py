"""Megatron-core's checks on the names of tensor types, opened for other devices than CUDA.

Its optimizers compare `Tensor.type()` with names such as `torch.cuda.BFloat16Tensor`. The functions
that do so run inside a mode in which this device's tensors have those names.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

TYPE_CHECKS = (
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.__init__",
    "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params.__init__",
    "megatron.core.optimizer.optimizer.clip_grad_by_total_norm_fp32",
)


class RenamedTypes(TorchFunctionMode):
    """`Tensor.type()` calls tensors of ``prefix`` CUDA's. Nothing else changes."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return self.renamed(result)
        return result

    def renamed(self, name: str) -> str:
        """``name`` of a type with CUDA's prefix for this device's; other names stay."""
        if name.startswith("torch.cuda.") or not name.startswith(self._prefix):
            return name
        return "torch.cuda." + name.removeprefix(self._prefix)


def run_inside(symbols: Iterable[str], mode: Callable[[], TorchFunctionMode]) -> None:
    """Replace functions by ones that run inside ``mode()``. Idempotent."""
    for symbol in symbols:
        owner, name = resolve(symbol)
        setattr(owner, name, _inside(getattr(owner, name), mode))


def resolve(symbol: str) -> tuple[Any, str]:
    """The object that holds `symbol` (a module or a class in one) and the attribute's name."""
    path, name = symbol.rsplit(".", 1)
    try:
        return importlib.import_module(path), name
    except ModuleNotFoundError:
        module, cls = path.rsplit(".", 1)
        return getattr(importlib.import_module(module), cls), name


def _inside(
    function: Callable[..., Any], mode: Callable[[], TorchFunctionMode]
) -> Callable[..., Any]:
    if hasattr(function, "__wrapped_for_device__"):
        return function

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with mode():
            return function(*args, **kwargs)

    run.__wrapped_for_device__ = True  # type: ignore[attr-defined]
    return run
