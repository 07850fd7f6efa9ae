"""What the ranks of a job tell each other outside the model: small objects and sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from mopd.errors import ConfigError, MopdError
from mopd.student.parallel import Topology

T = TypeVar("T")
HOST = torch.device("cpu")


def from_lead(topology: Topology, value: T | None) -> T:
    """The lead's ``value`` on every rank of its replica."""
    if len(topology.replica_ranks) > 1:
        box = [value]
        dist.broadcast_object_list(
            box, src=topology.lead_rank, group=topology.replica_group, device=HOST
        )
        value = box[0]
    assert value is not None
    return value


def computed_by_lead(topology: Topology, compute: Callable[[], T]) -> T:
    """``compute()`` of the lead on every rank of its replica.

    Raises:
        Exception: what ``compute`` raises, on the lead; elsewhere a ConfigError or MopdError that
            says the same.
    """
    value, problem = None, None
    if topology.is_lead:
        try:
            value = compute()
        except Exception as error:  # raised once the other ranks know
            problem = error
    said = None if problem is None else str(problem)
    value, said, is_config = from_lead(topology, (value, said, isinstance(problem, ConfigError)))
    if problem is not None:
        raise problem
    if said is not None:
        raise ConfigError(said) if is_config else MopdError(said)
    assert value is not None
    return value


def refuse_together(topology: Topology, problem: Exception | None, *, what: str) -> None:
    """Called by all ranks of a replica before they need each other.

    Raises:
        MopdError: on every rank, with ``what`` and the first rank's ``problem``, where one has any.
    """
    text = None if problem is None else f"{type(problem).__name__}: {problem}"
    everyone: list[str | None] = [text] * len(topology.replica_ranks)
    if len(everyone) > 1:
        dist.all_gather_object(everyone, text, group=topology.replica_group)
    for rank, said in zip(topology.replica_ranks, everyone, strict=True):
        if said is not None:
            raise MopdError(f"{what}: rank {rank}: {said}") from problem


def any_rank(topology: Topology, value: bool) -> bool:
    """Whether ``value`` is true on any rank of the job; the same on all. A few bytes."""
    found = torch.tensor([int(value)])
    for group in (topology.replica_group, topology.dp_host_group):
        if group.size() > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return bool(found.item())


def from_main(value: T | None) -> T:
    """Rank 0's ``value`` on every rank of the job."""
    box = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return box[0]


def from_all(value: T) -> list[T]:
    """Every rank's ``value`` on every rank of the job, in order of the ranks."""
    found = [value] * dist.get_world_size()
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found


def sum_over_leads(topology: Topology, values: np.ndarray) -> np.ndarray:
    """Sum of float64 vectors over the same place of every replica."""
    return _reduced(topology, np.asarray(values, dtype=np.float64), dist.ReduceOp.SUM)


def max_over_leads(topology: Topology, values: np.ndarray) -> np.ndarray:
    """The larger values of vectors over the same place of every replica."""
    return _reduced(topology, values, dist.ReduceOp.MAX)


def _reduced(topology: Topology, values: np.ndarray, how: dist.ReduceOp.RedOpType) -> np.ndarray:
    if topology.dp_size == 1:
        return values
    tensor = torch.from_numpy(values.copy())
    dist.all_reduce(tensor, op=how, group=topology.dp_host_group)
    return tensor.numpy()


def gather_leads(topology: Topology, value: T) -> list[T]:
    """``value`` of every replica's lead, in order of the replicas. Called by leads only."""
    if topology.dp_size == 1:
        return [value]
    parts: list[T] = [value] * topology.dp_size
    dist.all_gather_object(parts, value, group=topology.dp_host_group)
    return parts
