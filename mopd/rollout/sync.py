"""Weights of version n + 1 from the sharded student to the samplers, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from mopd.rollout.base import Sampler


def push(
    weights: Iterator[tuple[str, Tensor | None]], sampler: Sampler | None, *, version: int
) -> None:
    """Hands the stream to the sampler; ranks without one only take part in gathering it.

    ``weights`` is collective over the replica, with expert parallelism over all ranks of the job,
    so every rank must run it to its end.
    """
    if sampler is None:
        for _ in weights:
            pass
        return
    sampler.load_weights(
        ((name, tensor) for name, tensor in weights if tensor is not None), version=version
    )
