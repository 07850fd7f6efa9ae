"""NVIDIA GPUs: megatron-core's home, so nothing is patched."""

from __future__ import annotations

import torch

from mopd.errors import ConfigError


class CudaDevice:
    """One CUDA device per process, NCCL between them."""

    name = "cuda"
    dist_backend = "nccl"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ConfigError(
                "run.device: cuda is not available here; install a CUDA build of torch and check "
                "the driver, or set run.device=cpu"
            )

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cuda", local_rank)

    def set_device(self, local_rank: int) -> None:
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ConfigError(
                f"run.device: local rank {local_rank} needs a GPU of its own and this host shows "
                f"{count}; start at most {count} processes per host"
            )
        torch.cuda.set_device(local_rank)

    def current_device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def memory_stats(self) -> dict[str, int]:
        return {
            "allocated": torch.cuda.memory_allocated(),
            "peak": torch.cuda.max_memory_allocated(),
        }

    def supports_bf16(self) -> bool:
        return torch.cuda.is_bf16_supported()

    def rng_state(self) -> torch.Tensor:
        return torch.cuda.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.cuda.set_rng_state(state)

    def prepare_megatron(self) -> None:
        """Nothing to do."""
