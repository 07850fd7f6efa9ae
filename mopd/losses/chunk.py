"""The chunk-likelihood term: how likely each side writes the text of a chunk (ALM, 2503.20083)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mopd.losses.base import Chunks, Coupled, RowBlock, zero
from mopd.losses.softmax import tempered
from mopd.losses.vocab import VocabShard


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTerm:
    """The coupled part of a loss: ``lambda_chunk`` times a Bernoulli KL per chunk.

    The chain rule over a chunk's own tokens joins rows of different blocks, hence two passes.
    """

    lambda_chunk: float

    @property
    def coupled(self) -> bool:
        return self.lambda_chunk > 0.0

    def measure(self, logits: Tensor, rows: RowBlock, shard: VocabShard) -> Tensor:
        return token_logprobs(logits, rows, shard, temperature=1.0)

    def couple(self, token_logprob: Tensor, chunk_logprob: Tensor, chunks: Chunks) -> Coupled:
        """1-1 chunks count nothing: the boundary term has judged them."""
        value, slope = binary_chunk_kl(chunk_logprob, chunks.teacher_logprob)
        weight = self.lambda_chunk * (chunks.size.sum(dim=-1) > 2).to(value.dtype) * chunks.weight
        reported = torch.where(chunks.owned, weight * value, 0.0).sum()
        return Coupled(
            loss=reported, token_grad=(weight * slope)[chunks.token_chunk], kl=zero(reported)
        )


def token_logprobs(
    logits: Tensor, rows: RowBlock, shard: VocabShard, *, temperature: float
) -> Tensor:
    """[t] the student's log-probability of every chunk token of the block."""
    scaled = logits if temperature == 1.0 else logits / temperature
    return shard.pick(scaled, rows.token_row, rows.token_id) - shard.lse(scaled)[rows.token_row]


def binary_chunk_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL of Bernoulli(exp teacher) from Bernoulli(exp student), and its slope in ``student``.

    Chunk likelihood of ALM (2503.20083) at temperature 1; arguments are log-probabilities [C].
    Both are held at or below -1e-6 so that log(1 - P) stays finite; the slope is that of the held
    value.
    """
    ceiling = -1e-6
    held = student.clamp_max(ceiling)
    p_teacher = torch.exp(teacher.clamp_max(ceiling))
    p_student = torch.exp(held)
    log_not_teacher = torch.log(-torch.expm1(teacher.clamp_max(ceiling)))
    log_not_student = torch.log(-torch.expm1(held))
    value = p_teacher * (teacher.clamp_max(ceiling) - held)
    value = value + (1.0 - p_teacher) * (log_not_teacher - log_not_student)
    slope = (p_student - p_teacher) / (-torch.expm1(held))
    return value, torch.where(student <= ceiling, slope, torch.zeros_like(slope))


def add_token_gradient(
    out: Tensor, logits: Tensor, rows: RowBlock, token_grad: Tensor, shard: VocabShard
) -> None:
    """Adds d/d(logits) of sum_t token_grad_t * log p(token_t) at temperature 1."""
    probs = shard.softmax(logits, out=torch.empty_like(logits))
    out.addcmul_(probs, _row_sums(rows, token_grad, len(out))[:, None], value=-1.0)
    _add_at_tokens(out, rows, token_grad, shard)


def write_token_gradient(
    out: Tensor,
    logits: Tensor,
    rows: RowBlock,
    token_grad: Tensor,
    shard: VocabShard,
    *,
    temperature: float,
) -> None:
    """``out`` becomes d/d(logits) of sum_t token_grad_t * log p(token_t), p at ``temperature``."""
    amount = token_grad / temperature
    tempered(logits, out, temperature, shard).mul_(-_row_sums(rows, amount, len(out))[:, None])
    _add_at_tokens(out, rows, amount, shard)


def _row_sums(rows: RowBlock, token_grad: Tensor, num_rows: int) -> Tensor:
    return token_grad.new_zeros(num_rows).index_add_(0, rows.token_row, token_grad)


def _add_at_tokens(out: Tensor, rows: RowBlock, token_grad: Tensor, shard: VocabShard) -> None:
    column, mine = shard.local(rows.token_id)
    out.index_put_((rows.token_row, column), torch.where(mine, token_grad, 0.0), accumulate=True)
