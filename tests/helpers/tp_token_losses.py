"""What every rank of a tensor-parallel test of the token losses runs."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from mopd.config.schema import ParallelSection
from mopd.device import get_device
from mopd.losses.cross_entropy import cross_entropy, targets
from mopd.losses.source import LogitsSource
from mopd.losses.vocab import VocabShard
from mopd.student.parallel import initialize
from tests.helpers.random_losses import V_S
from tests.helpers.token_losses import build_opd, run_tokens, sampled, sft_micro


def _cut(logits: Tensor, size: int, *, padding: float) -> tuple[Tensor, VocabShard]:
    """This rank's columns of ``logits`` [..., V_S]; padded columns hold ``padding``."""
    topology = initialize(
        ParallelSection(tensor_model_parallel_size=size), backend=get_device("cpu"), seed=1
    )
    width = -(-V_S // size)
    start = topology.tp_rank * width
    padded = torch.full((*logits.shape[:-1], width * size), padding, dtype=logits.dtype)
    padded[..., :V_S] = logits
    shard = VocabShard(start=start, size=width, vocab_size=V_S, group=topology.tp_group)
    return padded[..., start : start + width].contiguous(), shard


def opd_result(size: int, options: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """(scalars, this rank's gradient columns)."""
    loss = build_opd(**options)
    case = sampled(7, temperature=loss.sampling_temperature)
    logits, shard = _cut(case.logits, size, padding=50.0)
    result, gradient = run_tokens(loss, case, logits=logits, shard=shard)
    return {"loss": result.loss, "kl": result.kl, **result.extra}, gradient


def cross_entropy_result(size: int) -> tuple[Tensor, Tensor]:
    logits, micro = sft_micro(0)
    part, shard = _cut(logits, size, padding=50.0)
    source = LogitsSource(part.flatten(0, 1), shard)
    value = cross_entropy(source, micro, shard, scale=1.3, block_rows=2)
    return value, source.finish()


def megatron_result(size: int) -> tuple[Tensor, Tensor]:
    """Megatron's own function, in its float32; it takes padded columns for tokens."""
    logits, micro = sft_micro(0)
    part, _ = _cut(logits, size, padding=-1e4)
    leaf = part.flatten(0, 1).float().requires_grad_()
    positions, ids = targets(micro)
    value = vocab_parallel_cross_entropy(leaf[positions].clone(), torch.as_tensor(ids)).sum()
    (1.3 * value).backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad
