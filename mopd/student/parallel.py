"""Process groups: where this rank sits, and the groups mopd itself talks over."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from mopd.config.schema import ParallelSection
from mopd.device import DeviceBackend
from mopd.errors import ConfigError

TIMEOUT = timedelta(minutes=10)  # of a collective, at least


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """This rank's place. A replica is the tp x pp x cp ranks that hold one copy of the model.

    `replica_group` and `dp_host_group` also carry CPU tensors and objects, on every device.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    vp_size: int  # stages of each pipeline rank
    cp_rank: int
    cp_size: int
    ep_rank: int
    ep_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup | None  # None when tp_size is 1
    cp_group: dist.ProcessGroup | None  # None when cp_size is 1
    ep_group: dist.ProcessGroup | None  # None when ep_size is 1
    dp_cp_group: dist.ProcessGroup
    dp_host_group: dist.ProcessGroup  # of replicas, alike places
    dp_cp_host_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup
    replica_ranks: tuple[int, ...]  # global ranks, ascending
    stage_ranks: tuple[int, ...]  # global rank of tp = cp = 0 in each stage of this replica
    device: torch.device

    @property
    def lead_rank(self) -> int:
        """Global rank of this replica's tp = pp = cp = 0."""
        return self.stage_ranks[0]

    @property
    def tail_rank(self) -> int:
        """Global rank of tp = cp = 0 in this replica's last stage."""
        return self.stage_ranks[-1]

    @property
    def is_lead(self) -> bool:
        return self.rank == self.lead_rank

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1


def initialize(
    parallel: ParallelSection,
    *,
    backend: DeviceBackend,
    seed: int,
    timeout: timedelta = TIMEOUT,
) -> Topology:
    """Join the job that torchrun's environment describes; without one, a world of this process.

    Ranks wait for each other up to ``timeout``: for a lead that waits for its teachers, too.

    Raises ConfigError when the layout does not fit the number of processes.
    """
    # Megatron warns, and loses overlap, unless kernels queue in one order; read on every device.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    backend.set_device(local_rank)
    backend.prepare_megatron()
    _join(backend, timeout)
    _check(parallel, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=_virtual(parallel),
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        distributed_timeout_minutes=int(timeout.total_seconds() // 60),
    )
    # One stream of random numbers per pipeline stage, as Megatron's own trainer seeds it.
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)
    return _topology(backend, local_rank, timeout)


def adopt(backend: DeviceBackend, *, timeout: timedelta = TIMEOUT) -> Topology:
    """This rank's place in a job whose `parallel_state` somebody else has initialised, with its
    gloo groups. Collective over all ranks."""
    return _topology(backend, int(os.environ.get("LOCAL_RANK", "0")), timeout)


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, or cannot be reached."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    # gloo raises bare RuntimeErrors
    text = str(error)
    return isinstance(error, RuntimeError) and "gloo" in text and "by peer" in text


def shutdown() -> None:
    """Leave the job and forget every group; `initialize` may follow."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(backend: DeviceBackend, timeout: timedelta) -> None:
    if "RANK" in os.environ:
        dist.init_process_group(backend.dist_backend, init_method="env://", timeout=timeout)
        return
    # Port 0: the store takes any free port, so that two lone runs on a host never meet.
    store = TCPStore("127.0.0.1", 0, world_size=1, is_master=True, timeout=TIMEOUT)
    dist.init_process_group(
        backend.dist_backend, store=store, rank=0, world_size=1, timeout=timeout
    )


def _check(parallel: ParallelSection, world_size: int) -> None:
    sizes = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    if world_size % (sizes[0] * sizes[1] * sizes[2]):
        raise ConfigError(
            f"student.parallel: tensor x pipeline x context sizes {sizes} do not divide the "
            f"{world_size} processes; change the sizes or the number of processes"
        )
    replicas = world_size // (sizes[0] * sizes[1] * sizes[2])
    if replicas * sizes[2] % parallel.expert_model_parallel_size:
        raise ConfigError(
            f"student.parallel.expert_model_parallel_size={parallel.expert_model_parallel_size} "
            f"must divide data x context parallel size ({replicas * sizes[2]}); lower it"
        )


def _virtual(parallel: ParallelSection) -> int | None:
    """Megatron wants None where there is nothing to interleave."""
    size = parallel.virtual_pipeline_model_parallel_size or 1
    return size if size > 1 else None


def _topology(backend: DeviceBackend, local_rank: int, timeout: timedelta) -> Topology:
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    cp_rank = parallel_state.get_context_parallel_rank()
    dp_rank = parallel_state.get_data_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    pp_size = parallel_state.get_pipeline_model_parallel_world_size()
    cp_size = parallel_state.get_context_parallel_world_size()
    ep_size = parallel_state.get_expert_model_parallel_world_size()
    # (dp, pp, cp, tp) of every rank: Megatron's rank order stays Megatron's business.
    places: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)] * dist.get_world_size()
    dist.all_gather_object(places, (dp_rank, pp_rank, cp_rank, tp_rank))
    replica_group, replica_ranks = _replica_group(backend, places, dp_rank, timeout)
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=tp_rank,
        tp_size=tp_size,
        pp_rank=pp_rank,
        pp_size=pp_size,
        vp_size=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        cp_rank=cp_rank,
        cp_size=cp_size,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=ep_size,
        dp_rank=dp_rank,
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_group=_group(parallel_state.get_tensor_model_parallel_group()) if tp_size > 1 else None,
        cp_group=_group(parallel_state.get_context_parallel_group()) if cp_size > 1 else None,
        ep_group=_group(parallel_state.get_expert_model_parallel_group()) if ep_size > 1 else None,
        dp_cp_group=_group(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        dp_host_group=_group(parallel_state.get_data_parallel_group_gloo()),
        dp_cp_host_group=_group(
            parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)
        ),
        replica_group=replica_group,
        replica_ranks=replica_ranks,
        stage_ranks=tuple(places.index((dp_rank, stage, 0, 0)) for stage in range(pp_size)),
        device=backend.device(local_rank),
    )


def _group(group: object) -> dist.ProcessGroup:
    """A group this rank belongs to; torch types the others as integers."""
    assert isinstance(group, dist.ProcessGroup)
    return group


def _replica_group(
    backend: DeviceBackend,
    places: list[tuple[int, int, int, int]],
    dp_rank: int,
    timeout: timedelta,
) -> tuple[dist.ProcessGroup, tuple[int, ...]]:
    """Every rank takes part in making every replica's group, in one order."""
    kinds = "gloo" if backend.name == "cpu" else f"cpu:gloo,{backend.name}:{backend.dist_backend}"
    mine: tuple[dist.ProcessGroup, tuple[int, ...]] | None = None
    for replica in sorted({place[0] for place in places}):
        ranks = tuple(rank for rank, place in enumerate(places) if place[0] == replica)
        group = dist.new_group(list(ranks), timeout=timeout, backend=kinds)
        if replica == dp_rank:
            mine = _group(group), ranks
    assert mine is not None
    return mine
