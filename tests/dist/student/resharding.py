"""What a student's state is as whole tensors, and rank functions that save and load it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    get_cuda_rng_tracker,
    set_tensor_model_parallel_attributes,
)

from mopd.config.schema import OptimizerSection
from mopd.losses.base import LossOutput
from mopd.student import model
from mopd.student.checkpoint import Saver, find_latest, load
from mopd.student.hf_io import load_hf
from mopd.student.sharded import Shard, describe, optimizer_step
from mopd.student.step import StepResult, Student
from mopd.types import MicroBatch, StepBatch
from tests.dist.student import worlds
from tests.dist.student.worlds import NextToken, Run, step_batch

SEED = 3


class Noisy:
    """The shared loss, scaled by draws from every generator that a checkpoint holds."""

    def __init__(self, student: Student) -> None:
        self._loss = NextToken(student.model)

    def __call__(
        self, logits: torch.Tensor, micro_batch: MicroBatch, batch: StepBatch
    ) -> LossOutput:
        output = self._loss(logits, micro_batch, batch)
        noise = float(torch.rand(())) + random.random() + float(np.random.rand())
        return LossOutput(total=output.total * (1.0 + noise), metrics=output.metrics)


def build(run: Run, *, distributed: bool = False, noisy: bool = False) -> Student:
    section = OptimizerSection(
        lr=1e-2,
        lr_warmup_fraction=0.2,
        adam_eps=1e-4,
        clip_grad=0.5,
        use_distributed_optimizer=distributed,
    )
    plain = worlds.build(run, section=section)
    random.seed(0)
    np.random.seed(0)
    if not noisy:
        return plain
    return Student(
        model=plain.model,
        optimizer=plain.optimizer,
        scheduler=plain.scheduler,
        loss_function=Noisy(plain),
        clip_grad=0.5,
        fused_head=True,
    )


def advance(student: Student, run: Run, steps: range) -> list[StepResult]:
    dp_rank = student.model.topology.dp_rank
    return [student.train_step(step_batch(s, run=run, dp_rank=dp_rank)) for s in steps]


@dataclass(frozen=True)
class Whole:
    """Everything a checkpoint keeps of a student, without a layout; the same on every rank."""

    tensors: dict[str, torch.Tensor]
    optimizer_step: int
    scheduler: dict[str, Any]
    lr: float
    losses: list[float] = field(default_factory=list)


def whole(student: Student, results: list[StepResult] | None = None) -> Whole:
    """Gathers every tensor of every rank: copies must agree bit by bit, parts must cover it."""
    own = [
        (s.key, s.data.clone(), s.whole, s.offset)
        for s in describe(student.model, student.optimizer)
    ]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    tensors: dict[str, torch.Tensor] = {}
    filled: dict[str, torch.Tensor] = {}
    for key, data, shape, offset in (found for rank in ranks for found in rank):
        target = tensors.setdefault(key, torch.zeros(shape, dtype=data.dtype))
        done = filled.setdefault(key, torch.zeros(shape, dtype=torch.bool))
        box = tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))
        assert torch.equal(target[box][done[box]], data[done[box]]), f"copies of {key} differ"
        target[box] = data
        done[box] = True
    assert all(done.all() for done in filled.values())
    # A rank without anything that learns has no groups.
    rates = [float(group["lr"]) for group in student.optimizer.param_groups]
    numbers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(numbers, (optimizer_step(student.optimizer), max(rates, default=0.0)))
    return Whole(
        tensors=tensors,
        optimizer_step=max(step for step, _ in numbers),
        scheduler=student.scheduler.state_dict(),
        lr=max(rate for _, rate in numbers),
        losses=[result.loss for result in results or []],
    )


def differences(got: Whole, want: Whole) -> list[str]:
    """Names of what is not bit by bit the same."""
    found = list(got.tensors.keys() ^ want.tensors.keys())
    found += [
        name
        for name in got.tensors.keys() & want.tensors.keys()
        if not torch.equal(got.tensors[name], want.tensors[name])
    ]
    pairs = {
        "optimizer_step": (got.optimizer_step, want.optimizer_step),
        "scheduler": (got.scheduler, want.scheduler),
        "lr": (got.lr, want.lr),
        "losses": (got.losses, want.losses),
    }
    return sorted(found) + [name for name, (a, b) in pairs.items() if a != b]


def shards_of(student: Student) -> list[Shard]:
    return describe(student.model, student.optimizer)


def save_at(
    run: Run, directory: str, distributed: bool, steps: int, start: str | None = None
) -> Whole:
    """Trains ``steps`` steps, or loads ``start``, and saves; what was saved."""
    student = build(run, distributed=distributed)
    if start is None:
        advance(student, run, range(steps))
    else:
        load(Path(start) / f"step-{steps:06d}", student=student, seed=SEED)
    Saver(Path(directory), student=student, keep_last=2).save({"step": steps})
    return whole(student)


def load_and_go_on(
    run: Run, directory: str, distributed: bool, steps: range
) -> tuple[Whole, Whole, bool]:
    """What was loaded, what is there after ``steps``, and whether generators start anew."""
    student = build(run, distributed=distributed)
    path = find_latest(Path(directory))
    assert path is not None
    restored = load(path, student=student, seed=SEED)
    assert restored.state == {"step": steps.start}
    loaded = whole(student)
    results = advance(student, run, steps)
    return loaded, whole(student, results), restored.reseeded


def straight(run: Run, distributed: bool, steps: int, after: int) -> Whole:
    """Without a break; losses from step ``after`` on."""
    student = build(run, distributed=distributed)
    return whole(student, advance(student, run, range(steps))[after:])


def draws_after_load(run: Run, directory: str) -> dict[str, float]:
    """The next number of every generator, once a checkpoint of another layout is loaded."""
    student = build(run)
    torch.rand(int(torch.randint(1, 9, ())) + student.model.topology.rank)
    path = find_latest(Path(directory))
    assert path is not None
    assert load(path, student=student, seed=SEED).reseeded
    found = {"torch": float(torch.rand(())), "numpy": float(np.random.rand())}
    with get_cuda_rng_tracker().fork():
        found["tracker"] = float(torch.rand(()))
    return found | {"python": random.random()}


def build_frozen(run: Run, distributed: bool) -> Student:
    """Only the last layer's feed-forward part learns: nothing does in an earlier stage."""

    def load_and_freeze(chunks: Any, *args: Any, **options: Any) -> None:
        load_hf(chunks, *args, **options)
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                is_last = layer.layer_number == chunk.config.num_layers
                layer.mlp.requires_grad_(is_last)
                layer.self_attention.requires_grad_(False)
            for name, parameter in chunk.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and ".mlp." in name)

    with mock.patch.object(model, "load_hf", load_and_freeze):
        return build(run, distributed=distributed)


def save_frozen(run: Run, directory: str, distributed: bool) -> Whole:
    student = build_frozen(run, distributed)
    advance(student, run, range(1))
    Saver(Path(directory), student=student, keep_last=1).save({"step": 1})
    return whole(student)


def load_frozen(run: Run, directory: str, distributed: bool) -> Whole:
    student = build_frozen(run, distributed)
    load(Path(directory) / "step-000001", student=student, seed=SEED)
    return whole(student)


def describe_a_silent_split(run: Run) -> None:
    """A layer whose weights are split, and whose description does not say so."""
    student = build(run)
    for name, parameter in student.model.named_parameters():
        if name.endswith("layer_norm_weight"):
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
    describe(student.model, student.optimizer)
