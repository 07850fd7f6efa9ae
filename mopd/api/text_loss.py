"""One text's loss: its value, its gradient, and what each token has of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopd.align.positions import context_slice
from mopd.api.aligned import AlignedText
from mopd.api.options import TEACHER
from mopd.api.scores import check_shape
from mopd.errors import ArgumentError
from mopd.losses.head import DistillationHead, TeacherTerm, couple_chunks
from mopd.losses.opd import OpdLoss
from mopd.losses.vocab import VocabShard
from mopd.types import MicroBatch, StepBatch, TeacherRows


class _Known(torch.autograd.Function):
    """A value whose gradient in the logits is known; its backward may run more than once."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None


@dataclass(frozen=True, slots=True)
class Call:
    """The student's side of one text. ``loss_mask`` [S] bool; None: every token."""

    student_logits: Tensor
    alignment: AlignedText
    loss_mask: Tensor | None

    def __post_init__(self) -> None:
        wanted = (len(self.alignment.student_ids), self.alignment.student.size)
        check_shape(self.student_logits, wanted, name="student_logits", tokens="student_ids")
        mask = self.loss_mask
        if mask is not None and (tuple(mask.shape) != wanted[:1] or mask.dtype != torch.bool):
            raise ArgumentError(
                f"loss_mask: [{wanted[0]}] bool is wanted, got {list(mask.shape)} {mask.dtype}"
            )

    def mask(self) -> np.ndarray:
        """[S] bool."""
        if self.loss_mask is None:
            return np.ones(len(self.alignment.student_ids), dtype=bool)
        return self.loss_mask.cpu().numpy()

    def token_logprobs(self, temperature: float) -> np.ndarray:
        """[S] float64: the student's log-probabilities of its own tokens."""
        logits = self.student_logits.detach()[:, : self.alignment.student.size].double()
        ids = torch.as_tensor(self.alignment.student_ids, dtype=torch.int64, device=logits.device)
        found = torch.log_softmax(logits / temperature, dim=-1).gather(1, ids[:, None])[:, 0]
        return found.cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class TextLoss:
    """What one text contributes.

    Args:
        loss: scalar with a gradient in the student's logits, to be differentiated once: a mean over
            chunks, or as ``normalization`` says, in nats (times temperature^2 with
            ``scale_by_t2``). 0 where nothing is judged.
        kl: scalar without a gradient: the divergence at the boundaries alone, the same mean.
        num_chunks: chunks that are judged.
        judged: [S] bool: student tokens in these chunks.
    """

    loss: Tensor
    kl: Tensor
    num_chunks: int
    judged: Tensor
    denominator: float
    _call: Call
    _rows: TeacherRows
    _term: TeacherTerm

    @cached_property
    def per_chunk(self) -> Tensor:
        """[num_chunks] each chunk's part, undivided: they add up to ``loss * denominator``."""
        if isinstance(self._term.loss, OpdLoss):
            return self._per_chunk_of_policy(self._term.loss)
        values = [self._alone(chunk) for chunk in range(self.num_chunks)]
        return torch.stack(values) if values else self.kl.new_zeros(0)

    @cached_property
    def per_token(self) -> Tensor:
        """[S] `per_chunk`, spread evenly over a chunk's student tokens; 0 where not ``judged``."""
        chunk = torch.as_tensor(self._rows.token_chunk, device=self.kl.device)
        size = torch.as_tensor(self._rows.chunk_size[:, 0], device=self.kl.device)
        result = self.kl.new_zeros(len(self.judged))
        place = torch.as_tensor(self._rows.token_position, device=self.kl.device)
        result[place] = self.per_chunk[chunk] / size[chunk]
        return result

    def _alone(self, chunk: int) -> Tensor:
        """The rows of one chunk by themselves: no term of these losses joins two chunks."""
        tokens = self._rows.token_position[self._rows.token_chunk == chunk]
        length = len(self.judged)
        here = np.full(length, -1)
        here[tokens[0] : tokens[-1] + 1] = np.arange(tokens[0], tokens[-1] + 1)
        total, _ = _sums(self._call, context_slice(self._rows, here), self._term)
        return total.detach()

    def _per_chunk_of_policy(self, loss: OpdLoss) -> Tensor:
        """Chunks of a policy gradient know each other (discount, masks of whole sequences), but
        its value is a sum over tokens: slope times log-probability."""
        rows, logits = self._rows, self._call.student_logits.detach()
        place = torch.as_tensor(rows.token_position, device=logits.device)
        ids = torch.as_tensor(rows.token_id, device=logits.device)[:, None]
        real = logits[place, : self._call.alignment.student.size].to(self.kl.dtype)
        log_pi = [
            torch.log_softmax(real / temperature, dim=-1).gather(1, ids)
            for temperature in (1.0, loss.sampling_temperature)
        ]
        slope = couple_chunks(loss, torch.cat(log_pi, dim=1), rows).token_grad
        chunk = torch.as_tensor(rows.token_chunk, device=logits.device)
        return self.kl.new_zeros(self.num_chunks).index_add_(0, chunk, slope * log_pi[1][:, 0])


def evaluate(call: Call, rows: TeacherRows, term: TeacherTerm, normalization: str) -> TextLoss:
    """The loss of ``rows``, whose positions count the text's tokens."""
    chunks, tokens = len(rows.position), int(rows.chunk_size[:, 0].sum())
    length = len(call.alignment.student_ids)
    divisor = {"chunk": chunks, "token": tokens, "sequence": length}[normalization]
    denominator = float(max(divisor, 1))
    logits = call.student_logits.detach().requires_grad_()
    with torch.enable_grad():
        total, kl = _sums(call, rows, term, logits=logits)
        (gradient,) = torch.autograd.grad(total, logits)
    judged = torch.zeros(length, dtype=torch.bool, device=logits.device)
    judged[torch.as_tensor(rows.token_position, device=logits.device)] = True
    return TextLoss(
        loss=_Known.apply(
            call.student_logits, total.detach() / denominator, gradient / denominator
        ),
        kl=kl / denominator,
        num_chunks=chunks,
        judged=judged,
        denominator=denominator,
        _call=call,
        _rows=rows,
        _term=term,
    )


def _sums(
    call: Call, rows: TeacherRows, term: TeacherTerm, *, logits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(loss, kl) as sums over chunks; the loss has a gradient in ``logits``."""
    given = call.student_logits.detach() if logits is None else logits
    length = len(given)
    head = DistillationHead(
        terms={TEACHER: replace(term, weight=1.0)},
        shard=VocabShard(start=0, size=given.shape[1], vocab_size=call.alignment.student.size),
    )
    micro = MicroBatch(
        tokens=call.alignment.student_ids[None].astype(np.int64),
        lengths=np.array([length], dtype=np.int64),
        response_mask=call.mask()[None],
        rows={TEACHER: rows},
    )
    batch = StepBatch(
        step=0,
        micro_batches=(micro,),
        denominators={TEACHER: 1.0},
        num_tokens=1,
        metrics={},
    )
    output = head(given[None], micro, batch)
    return output.total, output.metrics[f"kl/{TEACHER}"]
