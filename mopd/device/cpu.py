"""CPU with gloo, and the one place that makes megatron-core run without a CUDA device.

megatron-core 0.16 asks torch for CUDA in a few spots: `torch.cuda.current_device()`, literals
`device="cuda"`, the CUDA generators, `Tensor.cuda()`, and checks on the names of tensor types. The
shim replaces names in megatron's modules only (`REPLACED_SYMBOLS`); torch itself stays as it is.
"""

from __future__ import annotations

import functools
import logging
import resource
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from mopd.device.base import import_quietly
from mopd.device.tensor_types import TYPE_CHECKS, RenamedTypes, resolve, run_inside
from mopd.errors import ConfigError

HOST = torch.device("cpu")

# Modules whose global `torch` becomes a view of torch in which "cuda" means the host.
_TORCH_VIEWS = (
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.models.common.embeddings.rotary_pos_embedding",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.tensor_parallel.random",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
)
# Functions that read or write the CUDA generator; random.py gets the host's generator instead.
_GENERATOR_FUNCTIONS = (
    "megatron.core.tensor_parallel.random._get_cuda_rng_state",
    "megatron.core.tensor_parallel.random._set_cuda_rng_state",
)
# Functions that call `Tensor.cuda()` or compare `Tensor.type()` with a CUDA name; none is hot.
_SCOPED_FUNCTIONS = (
    "megatron.core.models.common.language_module.language_module."
    "LanguageModule.setup_embeddings_and_output_layer",
    *TYPE_CHECKS,
)
REPLACED_SYMBOLS: tuple[str, ...] = (
    *(f"{module}.torch" for module in _TORCH_VIEWS),
    *_GENERATOR_FUNCTIONS,
    *_SCOPED_FUNCTIONS,
)


class CpuDevice:
    """The host itself, gloo between processes."""

    name = "cpu"
    dist_backend = "gloo"

    def device(self, local_rank: int) -> torch.device:
        del local_rank  # every process shares the host
        return HOST

    def set_device(self, local_rank: int) -> None:
        """Nothing to do."""

    def current_device(self) -> torch.device:
        return HOST

    def synchronize(self) -> None:
        """Nothing to do: host work is never queued."""

    def empty_cache(self) -> None:
        """Nothing to do: the host's allocator keeps little."""

    def memory_stats(self) -> dict[str, int]:
        # getrusage counts kibibytes, except on macOS where it counts bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"allocated": peak, "peak": peak}

    def supports_bf16(self) -> bool:
        return True

    def rng_state(self) -> None:
        """The host's own generator is torch's, which is kept anyway."""

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Nothing to do: see `rng_state`."""

    def prepare_megatron(self) -> None:
        """Patch megatron-core for the host. Raises ConfigError where a CUDA device is visible."""
        if torch.cuda.is_available():
            raise ConfigError(
                "run.device: megatron-core uses the CUDA device of this machine; set "
                "run.device=cuda, or hide it with CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        import_quietly(*_TORCH_VIEWS, "megatron.core.models.common.language_module.language_module")
        view = _torch_view()
        for module in _TORCH_VIEWS:
            sys.modules[module].torch = view  # type: ignore[attr-defined]
        for symbol, replacement in zip(
            _GENERATOR_FUNCTIONS, (_get_rng_state, _set_rng_state), strict=True
        ):
            owner, name = resolve(symbol)
            setattr(owner, name, replacement)
        run_inside(_SCOPED_FUNCTIONS, _HostTensors)
        # It warns where the host's generator moves inside a device's; here they are one.
        logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)


class _HostCuda(ModuleType):
    """`torch.cuda` in which the current device, the queue and the generator are the host's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return HOST

    @staticmethod
    def synchronize(device: object = None) -> None:
        del device

    @staticmethod
    def empty_cache() -> None:
        pass

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    @staticmethod
    def get_rng_state(device: object = None) -> torch.Tensor:
        del device
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        del device
        torch.set_rng_state(state)


class _HostTorch(ModuleType):
    """`torch` whose factory functions read `device="cuda"` as the host; all else is torch's own."""

    cuda = _HostCuda("torch.cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_host(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = HOST
        return factory(*args, **kwargs)

    return build


@functools.cache
def _torch_view() -> ModuleType:
    view = _HostTorch("torch")
    for name in ("empty", "full", "ones", "tensor", "zeros"):
        setattr(view, name, _on_host(getattr(torch, name)))
    return view


def _get_rng_state(
    device: object = "cuda", clone: bool = False, graph_safe: bool = False
) -> torch.Tensor:
    del device, clone, graph_safe
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
    del device, graph_safe
    torch.set_rng_state(new_state)


class _HostTensors(RenamedTypes):
    """`Tensor.cuda()` is the identity, and `Tensor.type()` names host tensors as CUDA's."""

    def __init__(self) -> None:
        super().__init__("torch.")

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)
