"""The driver of all losses: logits given, value and gradient out, block by block.

Every loss of every teacher writes d(loss)/d(logits) in closed form while the block is warm; the
autograd graph sees one node whose backward is a multiplication.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mopd.losses.base import Loss, LossOutput, LossSums, ProjectionRows, zero
from mopd.losses.rows import blocks
from mopd.losses.vocab import VocabShard
from mopd.types import MicroBatch, StepBatch, TeacherRows

# A block and its few temporaries should stay in cache: 512 rows of a large vocabulary do not.
BLOCK_ELEMENTS = 4_000_000
MIN_ROWS, MAX_ROWS = 16, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherTerm:
    """One teacher's part of the objective: ``weight * S / D`` with D its global boundary rows."""

    loss: Loss
    weight: float
    projection: ProjectionRows | None


class _ClosedForm(torch.autograd.Function):
    """A value with a gradient that is known already."""

    @staticmethod
    def forward(ctx, logits: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationHead:
    """Objective sum_m weight_m S_m / D_m over the teachers, in one fixed order on every rank.

    Called by the student step with vocabulary-parallel logits [B, L, V_local]. Blocks are upcast
    to float32 (or stay float64); the logits as a whole never are.
    """

    terms: Mapping[str, TeacherTerm]
    shard: VocabShard
    block_size: int | None = None  # rows; None: as many as fit BLOCK_ELEMENTS

    def __call__(self, logits: Tensor, micro: MicroBatch, batch: StepBatch) -> LossOutput:
        """``total`` is T * sum_m weight_m S_m / D_m with T the step's global number of tokens,
        because the optimizer step divides gradients by T (docs/architecture.md, sum first)."""
        flat = logits.detach().reshape(-1, logits.shape[-1])
        gradient = torch.zeros_like(flat)
        value = zero(flat).to(torch.promote_types(flat.dtype, torch.float32))
        metrics: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            payload = micro.rows.get(name)
            denominator = batch.denominators.get(name, 0.0)
            sums = LossSums(loss=torch.zeros_like(value), kl=torch.zeros_like(value))
            if payload is not None and denominator > 0 and len(payload.position):
                scale = term.weight * batch.num_tokens / denominator
                sums = self._teacher(flat, payload, term, scale, gradient)
                value = value + scale * sums.loss
            metrics[f"loss/{name}"], metrics[f"kl/{name}"] = sums.loss, sums.kl
        total = _ClosedForm.apply(logits, value, gradient.view_as(logits))
        return LossOutput(total=total, metrics=metrics)

    @torch.no_grad()
    def _teacher(
        self,
        flat: Tensor,
        payload: TeacherRows,
        term: TeacherTerm,
        scale: float,
        gradient: Tensor,
    ) -> LossSums:
        """Adds ``scale`` times the gradient of one teacher's loss; returns its unscaled sums."""
        coupled = term.loss.coupled
        dtype = torch.promote_types(flat.dtype, torch.float32)
        cut = list(
            blocks(
                payload,
                projection=term.projection,
                with_tokens=coupled,
                block_size=self.block_size or self._block_rows(),
                like=flat.new_zeros((), dtype=dtype),
            )
        )
        loss = kl = flat.new_zeros((), dtype=dtype)
        token_grad = None
        if coupled:
            measured = [
                term.loss.measure(self._block(flat, b.positions, dtype), b.rows, self.shard)
                for b in cut
            ]
            chunk_value, token_grad = _couple(
                term.loss, torch.cat([m.token_logprob for m in measured]), payload
            )
            loss = loss + chunk_value
        for block in cut:
            slope = None if token_grad is None else token_grad[block.tokens]
            logits = self._block(flat, block.positions, dtype)
            sums, grad = term.loss.grad(logits, block.rows, slope, self.shard)
            gradient[block.positions] += (scale * grad).to(gradient.dtype)
            loss, kl = loss + sums.loss, kl + sums.kl
        return LossSums(loss=loss, kl=kl)

    def _block_rows(self) -> int:
        return max(MIN_ROWS, min(MAX_ROWS, BLOCK_ELEMENTS // self.shard.size))

    def _block(self, flat: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        return self.shard.mask_padding(flat[positions].to(dtype))


def _couple(loss: Loss, token_logprob: Tensor, payload: TeacherRows) -> tuple[Tensor, Tensor]:
    """Chunk sums on every rank alike, then the slope of each token's log-probability."""
    device = token_logprob.device
    chunk = torch.as_tensor(payload.token_chunk, device=device)
    total = token_logprob.new_zeros(len(payload.position)).index_add_(0, chunk, token_logprob)
    teacher = torch.as_tensor(payload.chunk_logprob, device=device).to(token_logprob.dtype)
    size = torch.as_tensor(payload.chunk_size, device=device)
    value, slope = loss.couple(total, teacher, size)
    return value, slope[chunk]
