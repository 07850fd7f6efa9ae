"""torch's CUDA names point at the stand-in, as torch_npu's own module points them at the NPU."""

from __future__ import annotations

import functools
import warnings

import torch
from torch.utils._device import _device_constructors

import torch_npu

FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "from_file", "full"),
    *("full_like", "linspace", "logspace", "normal", "ones", "ones_like", "rand", "rand_like"),
    *("randint", "randint_like", "randn", "randn_like", "randperm", "range", "scalar_tensor"),
    *("tensor", "tril_indices", "triu_indices", "zeros", "zeros_like"),
)
NEW = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")


def _host(value):
    """The device as this machine has it: NPUs and, where an NPU is meant, CUDA are the host."""
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type in ("npu", "cuda") else value
    if isinstance(value, str):
        return "cpu" if value.split(":")[0] in ("npu", "cuda") else value
    return value


def _redirected(function, *, numbers_are_devices=False):
    @functools.wraps(function)
    def call(*args, **kwargs):
        args = [_host(value) for value in args]
        if numbers_are_devices and len(args) > 1 and type(args[1]) is int:
            args[1] = "cpu"
        if "device" in kwargs:
            device = kwargs["device"]
            kwargs["device"] = "cpu" if type(device) is int else _host(device)
        return function(*args, **kwargs)

    return call


def _typed(function):
    """Every tensor here passes for one on the NPU."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        if isinstance(result, str) and result.count(".") == 1:  # torch.FloatTensor
            return result.replace("torch.", "torch.npu.")
        return result

    return call


def _init():
    warnings.warn("torch's CUDA names are NPU's now", ImportWarning, stacklevel=2)
    for name in torch_npu.npu.__all__:
        setattr(torch.cuda, name, getattr(torch_npu.npu, name))
    torch.cuda.default_generators = torch_npu.npu.default_generators
    torch.cuda.random.get_rng_state = torch_npu.npu.get_rng_state
    torch.cuda.random.set_rng_state = torch_npu.npu.set_rng_state
    _device_constructors()  # `with torch.device(...)` knows torch's own functions, and keeps them
    for name in FACTORIES:
        setattr(torch, name, _redirected(getattr(torch, name)))
    for name in NEW:
        setattr(torch.Tensor, name, _redirected(getattr(torch.Tensor, name)))
    torch.Tensor.to = _redirected(torch.Tensor.to, numbers_are_devices=True)
    torch.nn.Module.to = _redirected(torch.nn.Module.to, numbers_are_devices=True)
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
    torch.Tensor.type = _typed(torch.Tensor.type)
    torch.jit.script = lambda thing, *args, **kwargs: thing


_init()
