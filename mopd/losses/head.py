"""The driver of all losses: logits, or their factors, in; value and gradient out, block by block.

Every loss of every teacher writes d(loss)/d(logits) in closed form while the block is warm; the
autograd graph sees one node whose backward hands the finished gradients on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mopd.losses.base import Chunks, Coupled, Loss, LossOutput, LossSums, ProjectionRows
from mopd.losses.cross_entropy import CROSS_ENTROPY, cross_entropy
from mopd.losses.domains import DomainKl
from mopd.losses.observe import Observer
from mopd.losses.rows import blocks
from mopd.losses.sizes import block_rows
from mopd.losses.source import LinearSource, LogitsSource, Source
from mopd.losses.vocab import VocabShard
from mopd.types import MicroBatch, StepBatch, TeacherRows


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherTerm:
    """One teacher's part of the objective: ``weight * S / D`` with D its global denominator."""

    loss: Loss
    weight: float
    projection: ProjectionRows | None
    observer: Observer | None = None  # None: the loss's own sums are all that is told


class _ClosedForm(torch.autograd.Function):
    """A value whose gradients in ``inputs`` are known already. Its backward runs once."""

    @staticmethod
    def forward(ctx, value: Tensor, gradients: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if upstream.device.type != "cpu" or float(upstream) != 1.0:  # no wait for the device
            for gradient in gradients:
                gradient.mul_(upstream)
        return None, None, *gradients


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationHead:
    """Objective kd * sum_m weight_m S_m / D_m + ce * cross-entropy, in one order on every rank.

    The two scales are those of the batch (`mopd.losses.balance`).

    Called by the student step with vocabulary-parallel logits [B, L, V_local], or through
    `from_hidden` with what they are the product of. Blocks are upcast to float32 (or stay float64);
    the logits as a whole never are.
    """

    terms: Mapping[str, TeacherTerm]
    shard: VocabShard
    block_size: int | None = None  # rows; None: as many as `block_rows` says

    def __call__(self, logits: Tensor, micro: MicroBatch, batch: StepBatch) -> LossOutput:
        """``total`` is T * sum_m weight_m S_m / D_m with T the step's global number of tokens,
        because the optimizer step divides gradients by T (docs/architecture.md, sum first)."""
        flat = logits.detach().reshape(-1, logits.shape[-1])
        source = LogitsSource(flat, self.shard)
        value, metrics = self._run(source, micro, batch)
        total = _ClosedForm.apply(value, (source.finish().view_as(logits),), logits)
        return LossOutput(total=total, metrics=metrics)

    def from_hidden(
        self, hidden: Tensor, weight: Tensor, micro: MicroBatch, batch: StepBatch
    ) -> LossOutput:
        """The same for logits ``hidden [B, L, H] @ weight [V_local, H].T``, which never all exist.

        The gradient of ``hidden`` is this vocabulary shard's part: whoever hands it in sums it over
        the tensor-parallel ranks, as a column-parallel layer does.
        """
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        frozen = not weight.requires_grad
        source = LinearSource(flat, weight.detach(), self.shard, frozen=frozen)
        value, metrics = self._run(source, micro, batch)
        of_hidden, of_weight = source.finish()
        gradients, inputs = (of_hidden.view_as(hidden),), (hidden,)
        if of_weight is not None:
            gradients, inputs = (*gradients, of_weight), (hidden, weight)
        total = _ClosedForm.apply(value, gradients, *inputs)
        return LossOutput(total=total, metrics=metrics)

    def _run(
        self, source: Source, micro: MicroBatch, batch: StepBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        value = torch.zeros((), dtype=source.dtype, device=source.device)
        metrics: dict[str, Tensor] = {}
        by_domain = DomainKl(micro, value)
        for name, term in self.terms.items():
            payload = micro.rows.get(name)
            denominator = batch.denominators.get(name, 0.0)
            sums = LossSums(loss=torch.zeros_like(value), kl=torch.zeros_like(value))
            if payload is not None and denominator > 0:
                weight = batch.weights.get(name, term.weight) * batch.distillation_weight
                scale = weight * batch.num_tokens / denominator
                sums = self._teacher(source, payload, term, scale, by_domain)
                value = value + scale * sums.loss
            metrics[f"loss/{name}"], metrics[f"kl/{name}"] = sums.loss, sums.kl
            metrics |= {f"{kind}/{name}": extra for kind, extra in sums.extra.items()}
            if payload is not None and term.observer is not None:
                shard = self.shard.without_padding()
                metrics |= term.observer.sums(source, payload, micro, shard)
        metrics |= by_domain.sums()
        if batch.crossentropy_weight > 0 and batch.num_response_tokens > 0:
            scale = batch.crossentropy_weight * batch.num_tokens / batch.num_response_tokens
            rows = self.block_size or self._block_rows(source.device)
            total = cross_entropy(source, micro, self.shard, scale=scale, block_rows=rows)
            metrics[f"loss/{CROSS_ENTROPY}"] = total
            value = value + scale * total
        return value, metrics

    @torch.no_grad()
    def _teacher(
        self,
        source: Source,
        payload: TeacherRows,
        term: TeacherTerm,
        scale: float,
        by_domain: DomainKl,
    ) -> LossSums:
        """Adds ``scale`` times the gradient of one teacher's loss; returns its unscaled sums."""
        coupled = term.loss.coupled
        shard = self.shard.without_padding()
        like = torch.zeros((), dtype=source.dtype, device=source.device)
        cut = list(
            blocks(
                payload,
                projection=term.projection,
                with_tokens=coupled,
                block_size=self.block_size or self._block_rows(source.device),
                like=like,
            )
        )
        loss, kl, extra, token_grad = like, like, {}, None
        if coupled:
            measured = [term.loss.measure(source.read(b), b.rows, shard) for b in source.visit(cut)]
            token_logprob = torch.cat(measured) if measured else like.new_zeros(0)
            joined = couple_chunks(term.loss, token_logprob, payload)
            loss, kl, extra = loss + joined.loss, kl + joined.kl, joined.extra
            token_grad = joined.token_grad
            by_domain.add_chunks(payload, joined)
        for block in source.visit(cut):
            slope = None if token_grad is None else token_grad[block.tokens]
            out = source.buffer(block)
            sums = term.loss.grad(source.read(block), out, block.rows, slope, shard, scale=scale)
            source.add(block, out)
            by_domain.add_rows(block, sums)
            loss, kl = loss + sums.loss, kl + sums.kl
        return LossSums(loss=loss, kl=kl, extra=extra)

    def _block_rows(self, device: torch.device) -> int:
        return block_rows(device.type, self.shard.size)


def couple_chunks(loss: Loss, token_logprob: Tensor, payload: TeacherRows) -> Coupled:
    """Chunk sums on every rank alike, then the slope of each token's log-probability.

    ``token_logprob`` is what `Loss.measure` gives for all tokens of ``payload``.
    """

    def tensor(array: np.ndarray) -> Tensor:
        if array.dtype.kind == "f":
            return torch.as_tensor(array, device=token_logprob.device).to(token_logprob.dtype)
        return torch.as_tensor(array, device=token_logprob.device)

    chunks = Chunks(
        token_chunk=tensor(payload.token_chunk),
        token_sampling_logprob=tensor(payload.token_sampling_logprob),
        teacher_logprob=tensor(payload.chunk_logprob),
        size=tensor(payload.chunk_size),
        weight=tensor(payload.chunk_weight),
        owned=tensor(payload.chunk_owned),
        sequence=tensor(payload.chunk_sequence),
    )
    plain = token_logprob if token_logprob.dim() == 1 else token_logprob[:, 0]
    total = torch.zeros_like(chunks.teacher_logprob)
    total.index_add_(0, chunks.token_chunk, plain)
    return loss.couple(token_logprob, total, chunks)
