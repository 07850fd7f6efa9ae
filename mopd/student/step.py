"""One optimizer step of the student, always through Megatron's schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mopd.align.share import ShareBy, share_micro_batch
from mopd.fault_points import fault_point
from mopd.losses.base import LossOutput
from mopd.student.model import StudentModel
from mopd.student.moe import pop_load
from mopd.student.optim import clip_gradients
from mopd.student.output import hidden_output, output_weight
from mopd.student.schedule import run_schedule
from mopd.types import MicroBatch, StepBatch

LossFunction = Callable[[torch.Tensor, MicroBatch, StepBatch], LossOutput]
# hidden states and the output weight, or logits and None; this rank's part of the micro-batch
Capture = Callable[[torch.Tensor, torch.Tensor | None, MicroBatch], None]
HOST = torch.device("cpu")


@runtime_checkable
class FusedLossFunction(Protocol):
    """A loss that takes hidden states [B, L, H] and the output weight [V_local, H] as well.

    Its gradient in the hidden states is the part of this vocabulary shard.
    """

    def __call__(
        self, logits: torch.Tensor, micro: MicroBatch, batch: StepBatch, /
    ) -> LossOutput: ...

    def from_hidden(
        self, hidden: torch.Tensor, weight: torch.Tensor, micro: MicroBatch, batch: StepBatch, /
    ) -> LossOutput: ...


class Companion(Protocol):
    """Weights that the loss itself trains beside the model, one shard per vocabulary shard.

    The loss adds to ``gradient``, at the loss's scale (times the step's tokens); `step` goes down
    it and clears it.
    """

    gradient: torch.Tensor

    def step(self, lr: float) -> None: ...

    def state(self) -> dict[str, np.ndarray]: ...

    def restore(self, state: Mapping[str, np.ndarray]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Companions:
    """By name, with their learning rate."""

    members: Mapping[str, Companion]
    lr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One step, the same on every rank. `loss` and `metrics` are sums over all replicas, but
    `moe/...` (`mopd.student.moe.pop_load`) are means."""

    loss: float  # sum of all micro-batches' `total`, divided by the step's real tokens
    grad_norm: float  # before clipping
    lr: float
    metrics: Mapping[str, float]
    skipped: bool  # a loss or gradient was not finite, so no weight changed


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """A batch's losses without a step, the same on every rank; as in `StepResult`."""

    loss: float
    metrics: Mapping[str, float]


class Student:
    """The model, its optimizer and its schedule.

    `loss_function(logits [B, L, V_local], micro_batch, batch)` runs on last-stage ranks. With T
    real tokens in the whole step and a loss sum_j lambda_j S_j / D_j, its totals add up, over all
    micro-batches of all replicas, to T * sum_j lambda_j S_j / D_j.

    ``share_by``: what context-parallel ranks must not tear when they share a loss's rows.

    With ``fused_head`` a `FusedLossFunction` gets hidden states and the output weight instead, and
    logits never exist as a whole.
    """

    def __init__(
        self,
        *,
        model: StudentModel,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        loss_function: LossFunction | FusedLossFunction,
        clip_grad: float,
        fused_head: bool,
        companions: Companions | None = None,
        share_by: ShareBy = "chunk",
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.companions = companions
        self._loss_function = loss_function
        self._from_hidden = (
            loss_function.from_hidden
            if fused_head and isinstance(loss_function, FusedLossFunction)
            else None
        )
        self._clip_grad = clip_grad
        self._share_by: ShareBy = share_by

    def train_step(self, batch: StepBatch, *, capture: Capture | None = None) -> StepResult:
        """Forward, backward, clip, update. Collective over all ranks.

        ``capture`` is shown what the loss reads, on ranks of the last stage.

        Micro-batches may differ in shape, and replicas in their number of micro-batches.
        """
        for chunk in self.model.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        fused = self._from_hidden is not None
        with hidden_output(self.model.head) if fused else nullcontext():
            outputs = run_schedule(
                self.model, batch.micro_batches, partial(self._loss, batch=batch, capture=capture)
            )
        sums = self._share(_sum_metrics(outputs))
        num_tokens = sums.pop(_TOKENS)
        if num_tokens != batch.num_tokens:
            # Megatron divides by the tokens it counts, the losses multiply by the batch's.
            raise ValueError(f"{batch.num_tokens=} but the micro-batches hold {num_tokens:.0f}")
        loss = sums.pop(_LOSS) / max(num_tokens, 1.0)
        sums |= pop_load(self.model, num_tokens)
        lr = float(self.optimizer.param_groups[0]["lr"])
        grad_norm = self._prepare_update()
        # Both numbers are equal on all ranks, so all ranks take the same branch.
        skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
        fault_point("step.gradients.ready")
        if not skipped:
            self.optimizer.step_with_ready_grads()
            fault_point("step.weights.changed")
            self.scheduler.step(1)
        self._step_companions(num_tokens, skipped=skipped)
        return StepResult(loss=loss, grad_norm=grad_norm, lr=lr, metrics=sums, skipped=skipped)

    def evaluate(self, batch: StepBatch) -> EvalResult:
        """The losses of ``batch``; no weight, gradient or generator changes. Collective."""
        fused = self._from_hidden is not None
        with hidden_output(self.model.head) if fused else nullcontext(), torch.no_grad():
            outputs = run_schedule(
                self.model,
                batch.micro_batches,
                partial(self._measured, batch=batch),
                forward_only=True,
            )
        if self.companions is not None:
            # the losses write their closed-form gradients there whoever asks; between steps it is 0
            for companion in self.companions.members.values():
                companion.gradient.zero_()
        sums = self._share(_sum_metrics(outputs))
        num_tokens = sums.pop(_TOKENS)
        return EvalResult(loss=sums.pop(_LOSS) / max(num_tokens, 1.0), metrics=sums)

    def forward_logits(self, tokens: np.ndarray) -> torch.Tensor:
        """Logits [B, L, vocab_size] of `tokens` [B, L] on every rank of the replica."""
        lengths = np.full(len(tokens), tokens.shape[1], dtype=np.int64)
        micro_batch = MicroBatch(
            tokens=tokens, lengths=lengths, response_mask=np.zeros(tokens.shape, dtype=bool)
        )
        with torch.no_grad():
            outputs = run_schedule(self.model, (micro_batch,), lambda _: _keep, forward_only=True)
        topology, model = self.model.topology, self.model
        size = (*tokens.shape, model.padded_vocab_size)
        if topology.is_last_stage:
            logits = _gather_vocab(outputs[0], topology.tp_group)
        else:
            logits = torch.empty(size, dtype=model.dtype, device=topology.device)
        dist.broadcast(logits, src=topology.tail_rank, group=topology.replica_group)
        return logits[..., : model.vocab_size]

    def logprobs(self, ids: np.ndarray, *, vocab_size: int) -> np.ndarray:
        """[L - 1] float32: of the tokens of ``ids`` [L] but the first, among the first
        ``vocab_size``. Collective over the replica, the same on all its ranks."""
        scores = self.forward_logits(ids[None, :].astype(np.int64))[0, :-1, :vocab_size]
        actual = torch.as_tensor(ids[1:], dtype=torch.int64, device=scores.device)
        scores = torch.log_softmax(scores.float(), dim=-1)
        return scores.gather(1, actual[:, None])[:, 0].cpu().numpy()

    def _loss(
        self, micro_batch: MicroBatch, *, batch: StepBatch, capture: Capture | None = None
    ) -> Callable[..., Any]:
        topology = self.model.topology
        cp_rank = topology.cp_rank

        def compute(
            last: torch.Tensor,
        ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            mine = share_micro_batch(micro_batch, cp_rank, topology.cp_size, by=self._share_by)
            weight = None if self._from_hidden is None else output_weight(self.model.head)
            if capture is not None:
                capture(last, weight, mine)
            if self._from_hidden is None or weight is None:
                output = self._loss_function(last, mine, batch)
            else:
                output = self._from_hidden(last, weight, mine, batch)
            # once for all context ranks: the schedule adds them up
            num_tokens = int(micro_batch.lengths.sum()) if cp_rank == 0 else 0
            metrics = {
                **{name: value.detach() for name, value in output.metrics.items()},
                _LOSS: output.total.detach(),
                _TOKENS: torch.tensor(float(num_tokens)),
            }
            count = torch.tensor(num_tokens, dtype=torch.int, device=last.device)
            return output.total, count, metrics

        return compute

    def _measured(self, micro_batch: MicroBatch, *, batch: StepBatch) -> Callable[..., Any]:
        compute = self._loss(micro_batch, batch=batch)

        def measure(last: torch.Tensor, non_loss_data: bool = True) -> dict[str, torch.Tensor]:
            del non_loss_data
            return compute(last)[2]

        return measure

    def _share(self, sums: dict[str, float]) -> dict[str, float]:
        """Add up the last stages of all replicas, then hand the sums to their other stages."""
        topology = self.model.topology
        totals: dict[str, float] = {}
        if topology.is_last_stage:
            parts: list[dict[str, float]] = [{}] * (topology.dp_size * topology.cp_size)
            dist.all_gather_object(parts, sums, group=topology.dp_cp_host_group)
            for part in parts:
                for name, value in part.items():
                    totals[name] = totals.get(name, 0.0) + value
        box = [totals]
        dist.broadcast_object_list(
            box, src=topology.tail_rank, group=topology.replica_group, device=HOST
        )
        return box[0]

    def _step_companions(self, num_tokens: float, *, skipped: bool) -> None:
        """As the optimizer does: gradients of all replicas added up, divided by the tokens."""
        if self.companions is None or not self.model.topology.is_last_stage:
            return
        for companion in self.companions.members.values():
            if skipped:
                companion.gradient.zero_()
                continue
            dist.all_reduce(companion.gradient, group=self.model.topology.dp_cp_group)
            companion.gradient.div_(max(num_tokens, 1.0))
            companion.step(self.companions.lr)

    def _prepare_update(self) -> float:
        """Make the gradients ready for the optimizer, clipped; their norm before that."""
        self.optimizer.prepare_grads()
        return clip_gradients(self.optimizer, self._clip_grad)


_LOSS, _TOKENS = "_loss", "_num_tokens"


def _keep(logits: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
    del non_loss_data
    return logits


def _sum_metrics(outputs: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Sums over micro-batches; a device is read in one go, not number by number."""
    every = [(name, value) for metrics in outputs for name, value in metrics.items()]
    sums = {name: 0.0 for name, _ in every}
    for kind in {(value.device, value.dtype) for _, value in every}:
        here = [(name, value) for name, value in every if (value.device, value.dtype) == kind]
        values = torch.stack([value.reshape(()) for _, value in here]).tolist()
        for (name, _), value in zip(here, values, strict=True):
            sums[name] += value
    return sums


def _gather_vocab(logits: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is None:
        return logits.contiguous()
    shards = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(shards, logits.contiguous(), group=group)
    return torch.cat(shards, dim=-1)
