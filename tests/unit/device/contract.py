"""What every device backend must do, as checks that a test or a process of its own can run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from mopd.device import DeviceBackend, check_dtype
from mopd.errors import ConfigError

Check = Callable[[DeviceBackend], None]


def is_named_like_its_devices(backend: DeviceBackend) -> None:
    assert backend.name in ("cpu", "cuda", "npu")
    assert backend.device(0).type == backend.name
    assert backend.device(3).index == (None if backend.name == "cpu" else 3)


def has_a_backend_that_torch_knows(backend: DeviceBackend) -> None:
    assert backend.dist_backend == {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}[backend.name]
    assert backend.name in dist.Backend.backend_capability[backend.dist_backend]


def current_device_is_the_one_that_was_set(backend: DeviceBackend) -> None:
    backend.set_device(0)
    assert backend.current_device() == backend.device(0)


def refuses_a_rank_without_a_device(backend: DeviceBackend) -> None:
    if backend.name == "cpu":  # shared by all
        backend.set_device(10_000)
        return
    before = backend.current_device()
    with pytest.raises(ConfigError, match=r"run\.device: local rank 10000 .* processes per host"):
        backend.set_device(10_000)
    assert backend.current_device() == before


def waits(backend: DeviceBackend) -> None:
    backend.set_device(0)
    backend.synchronize()


def counts_bytes(backend: DeviceBackend) -> None:
    kept = torch.zeros(2**22, device=backend.current_device()) + 1.0
    backend.synchronize()
    stats = backend.memory_stats()
    assert set(stats) == {"allocated", "peak"}
    assert all(type(value) is int for value in stats.values())
    assert kept.numel() * 4 <= stats["allocated"] <= stats["peak"]


def knows_whether_it_has_bfloat16(backend: DeviceBackend) -> None:
    assert type(backend.supports_bf16()) is bool
    check_dtype(backend, "float32")
    if backend.supports_bf16():
        check_dtype(backend, "bfloat16")
    else:
        with pytest.raises(ConfigError, match=r"student\.dtype=float32"):
            check_dtype(backend, "bfloat16")


def its_generator_repeats_itself(backend: DeviceBackend) -> None:
    state = backend.rng_state()
    if state is None:  # the host's, which torch.get_rng_state has
        assert backend.name == "cpu"
        return
    assert state.dtype == torch.uint8 and state.device.type == "cpu"

    def draw() -> list[float]:
        return torch.rand(4, device=backend.current_device(), generator=None).tolist()

    if backend.name == "cuda":
        first = draw()
        assert not torch.equal(backend.rng_state(), state)  # type: ignore[arg-type]
        backend.set_rng_state(state)
        assert draw() == first
    else:  # the stand-in draws on the host
        backend.set_rng_state(torch.Generator().manual_seed(7).get_state())
        assert not torch.equal(backend.rng_state(), state)  # type: ignore[arg-type]
        backend.set_rng_state(state)
        assert torch.equal(backend.rng_state(), state)  # type: ignore[arg-type]


def megatron_takes_its_tensors(backend: DeviceBackend) -> None:
    """Twice, because whoever starts a second run in one process prepares again."""
    from megatron.core.optimizer import optimizer

    backend.prepare_megatron()
    first = optimizer.clip_grad_by_total_norm_fp32
    backend.prepare_megatron()
    assert optimizer.clip_grad_by_total_norm_fp32 is first
    parameter = torch.nn.Parameter(torch.ones(2, device=backend.current_device()))
    parameter.grad = torch.full_like(parameter, 4.0)
    # `optimizer.__init__` asserts the name of the type with CUDA's
    optimizer.clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=4.0)
    assert parameter.grad.tolist() == pytest.approx([1.0, 1.0], rel=1e-4)


def gives_memory_back(backend: DeviceBackend) -> None:
    backend.set_device(0)
    kept = torch.ones(2**20, device=backend.current_device())
    backend.empty_cache()
    assert kept.sum().item() == 2**20
    if backend.name == "cuda":
        del kept
        before = torch.cuda.memory_reserved()
        backend.empty_cache()
        assert torch.cuda.memory_reserved() < before


CONTRACT: tuple[Check, ...] = (
    is_named_like_its_devices,
    has_a_backend_that_torch_knows,
    current_device_is_the_one_that_was_set,
    refuses_a_rank_without_a_device,
    waits,
    counts_bytes,
    gives_memory_back,
    knows_whether_it_has_bfloat16,
    its_generator_repeats_itself,
    megatron_takes_its_tensors,
)
