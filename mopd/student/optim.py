"""Megatron's Adam and its learning-rate schedule."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import megatron.core.optimizer
import torch
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    distrib_optimizer,
    get_megatron_optimizer,
)
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mopd.config.schema import OptimizerSection
from mopd.errors import ConfigError
from mopd.student.adam import Adam
from mopd.student.model import StudentModel


def build_optimizer(
    section: OptimizerSection, *, model: StudentModel, total_steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Adam with float32 main weights; norms and biases are not decayed, as in Megatron.

    Of N steps the first W = `lr_warmup_fraction` * N run at lr * (i + 1) / W, the last
    D = `lr_decay_fraction` * N fall linearly to min_lr + (lr - min_lr) / (D + 1), the rest run at
    lr. Where the two overlap, the warm-up ends as the decay begins.
    """
    if section.min_lr > section.lr:
        raise ConfigError(
            f"student.optimizer.min_lr ({section.min_lr}) is above lr ({section.lr}); lower it"
        )
    is_bf16 = model.dtype == torch.bfloat16
    with _own_adam(), warnings.catch_warnings():
        # of dense or expert parameters, where all of them are frozen
        warnings.filterwarnings("ignore", "WARNING: there is no optimizer on RANK")
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=section.lr,
                min_lr=section.min_lr,
                weight_decay=section.weight_decay,
                adam_beta1=section.adam_beta1,
                adam_beta2=section.adam_beta2,
                adam_eps=section.adam_eps,
                clip_grad=section.clip_grad,
                bf16=is_bf16,
                params_dtype=model.dtype,
                use_distributed_optimizer=section.use_distributed_optimizer,
            ),
            list(model.ddp),
        )
    _detach_shards(optimizer)
    warmup_steps = round(section.lr_warmup_fraction * total_steps)
    decay_steps = round(section.lr_decay_fraction * total_steps)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=min(warmup_steps, total_steps - decay_steps),
        # One step past the end, so that no step of the run has a learning rate of zero.
        lr_decay_steps=total_steps + 1,
        lr_decay_style="WSD",
        wsd_decay_steps=decay_steps + 1,
        lr_wsd_decay_style="linear",
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
    )
    scheduler.step(1)  # Megatron counts from 0, where the warm-up is still at zero
    return optimizer, scheduler


def clip_gradients(optimizer: MegatronOptimizer, max_norm: float) -> float:
    """The norm of the whole model's gradient, which is then scaled down to ``max_norm``; 0 leaves
    it. Collective over all ranks.

    Experts that are split over replicas have an optimizer of their own, whose gradients count in
    the one norm: Megatron's `clip_grad_norm` knows one optimizer only.
    """
    norm = float(optimizer.get_grad_norm())
    for member in inner_optimizers(optimizer):
        parameters: list[torch.Tensor] = [*member.get_parameters()]
        if max_norm > 0.0 and parameters:
            megatron_optimizer.clip_grad_by_total_norm_fp32(
                parameters, max_norm=max_norm, total_norm=norm
            )
    return norm


def inner_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers of dense and expert parameters, without those that have none here."""
    chained = isinstance(optimizer, ChainedOptimizer)
    members = optimizer.chained_optimizers if chained else [optimizer]
    return [member for member in members if not getattr(member, "is_stub_optimizer", False)]


def _detach_shards(optimizer: MegatronOptimizer) -> None:
    """Make the distributed optimizer's float32 shards leaves: torch warns at `grad` of others.

    Megatron slices them off the parameters themselves. The memory stays the parameter's.
    """
    for inner in inner_optimizers(optimizer):
        if not isinstance(inner, distrib_optimizer.DistributedOptimizer):
            continue
        leaves = {}
        for shard in (shard for group in inner.shard_fp32_groups for shard in group):
            leaves[id(shard)] = leaf = shard.detach()
            leaf.__dict__.update(shard.__dict__)  # Megatron's marks
        lists = [group["params"] for group in inner.optimizer.param_groups]
        for members in (*inner.shard_fp32_groups, *lists):
            members[:] = [leaves.get(id(member), member) for member in members]


@contextmanager
def _own_adam() -> Iterator[None]:
    """Within it Megatron builds `Adam` where it would take torch's.

    With Transformer Engine or Apex installed their fused Adam stays: same state, same arithmetic.
    """
    core = megatron.core.optimizer
    if not core.USING_PYTORCH_OPTIMIZER:
        yield
        return
    before = core.Adam, distrib_optimizer.Adam
    core.USING_PYTORCH_OPTIMIZER = False  # its branch ignores the global Adam
    core.Adam = distrib_optimizer.Adam = Adam  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        core.USING_PYTORCH_OPTIMIZER = True
        core.Adam, distrib_optimizer.Adam = before
