"""On-policy distillation as a policy gradient on the sampled tokens.

The gradient of the reverse KL is -E[A * d(log pi)], A = log pi_teacher - log pi of what was sampled
(MiMo-V2-Flash, eqs. 7 and 8). An action is a chunk: A adds up the chunk's own tokens on both sides
and every student token of the chunk receives the whole of it, because the log-probability of a
chunk is the sum of theirs. With equal tokenizers all chunks are 1-1: the per-token form.

Temperatures: A compares both models at temperature 1. The policy that sampled is the student at
``sampling_temperature``, so the importance ratio (both sides of it) and the log pi whose gradient
is taken are at that one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mopd.losses.base import Chunks, Coupled, LossSums, RowBlock, zero
from mopd.losses.chunk import token_logprobs, write_token_gradient
from mopd.losses.vocab import VocabShard

MAX_LOG_RATIO = 20.0
CHUNKS = "chunks"  # the count that the other sums of ``extra`` are divided by

Importance = Literal["icepop", "tis", "ppo", "sequence_mask", "none"]
# of the ratio, where a recipe gives none: IcePop's as MOPD uses it, TIS's and PPO's usual ones
BOUNDS: Mapping[Importance, tuple[float, float]] = {
    "icepop": (0.5, 2.0),
    "tis": (0.0, 2.0),
    "ppo": (0.8, 1.2),
    "sequence_mask": (0.999, 1.002),
    "none": (0.0, math.inf),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OpdLoss:
    """- sum_t chunk_weight * w_t * A * log pi(y_t), with w and A constants.

    Its value is no divergence (see ``kl`` for one); its gradient is the policy gradient.

    ``importance`` turns the ratio r = pi / mu of the student now to the sampler then into w:
    icepop: r within ``bounds``, else 0; tis: min(r, upper bound); ppo: r, but 0 where r has passed
    a bound in the direction of A (1707.06347); sequence_mask: r, but 0 for all tokens of a sequence
    whose geometric mean of r is outside ``bounds``; none: 1.

    ``policy`` is the pi in A: ``current``, or ``old`` for the sampler's own log-probabilities.
    A is held within ``max_advantage`` times the chunk's student tokens, weighed by ``iw_gamma``
    (`position_weights`), then by ``discount``: A_k <- sum_{j >= k} discount^(j - k) A_j over
    the chunks of its sequence.
    """

    importance: Importance
    bounds: tuple[float, float]
    max_advantage: float
    policy: Literal["current", "old"]
    discount: float
    iw_gamma: float
    sampling_temperature: float

    def __post_init__(self) -> None:
        if self.policy == "old" and self.sampling_temperature != 1.0:
            raise ValueError(
                "policy 'old' takes the advantage from the sampler's log-probabilities, which are "
                f"not at temperature 1 but at {self.sampling_temperature}; use policy 'current'"
            )

    @property
    def coupled(self) -> bool:
        return True

    def measure(self, logits: Tensor, rows: RowBlock, shard: VocabShard) -> Tensor:
        """[t] at temperature 1, or [t, 2]: also at the sampling temperature, where it differs."""
        plain = token_logprobs(logits, rows, shard, temperature=1.0)
        if self.sampling_temperature == 1.0:
            return plain
        sampled = token_logprobs(logits, rows, shard, temperature=self.sampling_temperature)
        return torch.stack([plain, sampled], dim=1)

    def couple(self, token_logprob: Tensor, chunk_logprob: Tensor, chunks: Chunks) -> Coupled:
        """``chunk_logprob`` [C] adds up the first column of `measure`.

        ``kl`` adds up -A before clipping: an estimate of the reverse KL of chunks. ``extra``
        are sums over chunks of the mean over a chunk's tokens: gated (whether w is not the ratio),
        ratio, log_ratio (its absolute value).
        """
        log_pi = token_logprob if token_logprob.dim() == 1 else token_logprob[:, 1]
        of_token = chunks.token_chunk
        log_ratio = log_pi - chunks.token_sampling_logprob
        ratio = torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
        gap = chunks.teacher_logprob - self._policy_logprob(chunk_logprob, chunks)
        advantage = self._advantage(gap, chunks)
        weight, gated = self._importance(ratio, advantage[of_token], chunks)
        slope = -chunks.weight[of_token] * weight * advantage[of_token]
        share = 1.0 / chunks.size[:, 0].clamp_min(1).to(ratio.dtype)[of_token]
        size = log_ratio.abs()
        weighted = torch.where(chunks.owned, chunks.weight * gap, 0.0)
        return Coupled(
            loss=(slope * log_pi).sum(),
            token_grad=slope,
            kl=-weighted.sum(),
            chunk_kl=-weighted,
            extra={
                CHUNKS: chunks.owned.sum().to(ratio.dtype),
                "distance": -torch.where(chunks.owned, gap, 0.0).sum(),
                "gated": (share * gated).sum(),
                "ratio": (share * ratio).sum(),
                "log_ratio": (share * size).sum(),
            },
        )

    def grad(
        self,
        logits: Tensor,
        out: Tensor,
        rows: RowBlock,
        token_grad: Tensor | None,
        shard: VocabShard,
        *,
        scale: float,
    ) -> LossSums:
        assert token_grad is not None
        write_token_gradient(
            out, logits, rows, token_grad * scale, shard, temperature=self.sampling_temperature
        )
        return LossSums(loss=zero(logits), kl=zero(logits))

    def _policy_logprob(self, chunk_logprob: Tensor, chunks: Chunks) -> Tensor:
        if self.policy == "current":
            return chunk_logprob
        sampled = torch.zeros_like(chunk_logprob)
        return sampled.index_add_(0, chunks.token_chunk, chunks.token_sampling_logprob)

    def _advantage(self, gap: Tensor, chunks: Chunks) -> Tensor:
        """[C] clipped before it is discounted: a bound on a chunk, not on a whole answer."""
        limit = self.max_advantage * chunks.size[:, 0].clamp_min(1).to(gap.dtype)
        advantage = torch.minimum(torch.maximum(gap, -limit), limit)
        if self.iw_gamma > 0.0:
            advantage = advantage * position_weights(advantage, _runs(chunks), self.iw_gamma)
        if self.discount > 0.0:
            advantage = discounted(advantage, _runs(chunks), self.discount)
        return advantage

    def _importance(
        self, ratio: Tensor, advantage: Tensor, chunks: Chunks
    ) -> tuple[Tensor, Tensor]:
        """(w [t], which tokens do not count with their ratio [t]).

        Gates multiply, so that a ratio that is not finite stays visible.
        """
        low, high = self.bounds
        if self.importance == "none":
            return torch.ones_like(ratio), torch.zeros_like(ratio, dtype=torch.bool)
        if self.importance == "tis":
            return ratio.clamp_max(high), ratio > high
        if self.importance == "icepop":
            kept = (ratio >= low) & (ratio <= high)
        elif self.importance == "ppo":
            kept = torch.where(advantage > 0, ratio <= high, ratio >= low)
        else:
            mean = _sequence_ratio(ratio, chunks)
            kept = (mean >= low) & (mean <= high)
        return ratio * kept, ~kept


def discounted(advantage: Tensor, run: Tensor, discount: float) -> Tensor:
    """sum_{j >= k} discount^(j - k) advantage_j over the entries [C] that share ``run`` with k.

    By doubling: after step s, entry k has added up the next 2^s of its run.
    """
    total, stride, factor = advantage.clone(), 1, discount
    while stride < len(total):
        together = run[stride:] == run[:-stride]
        ahead = torch.where(together, total[stride:] * factor, 0.0)
        total = torch.cat([total[:-stride] + ahead, total[-stride:]])
        stride, factor = 2 * stride, factor * factor
    return total


def position_weights(advantage: Tensor, run: Tensor, gamma: float) -> Tensor:
    """1 + gamma (1 - sum_{j < k} abs(A_j) / sum_j abs(A_j)) [C]: early tokens count more
    (2606.22600).

    What follows after the student has drifted from the teacher says less about the student.
    """
    size = advantage.abs()
    behind = discounted(size, run, 1.0)  # from k on: 1 minus the share before k, times the sum
    whole = torch.zeros_like(size).scatter_reduce_(0, run, behind, reduce="amax")[run]
    return 1.0 + gamma * torch.where(whole > 0, behind / whole, 1.0)


def _sequence_ratio(ratio: Tensor, chunks: Chunks) -> Tensor:
    """[t] geometric mean of the ratios of each token's sequence."""
    run = _runs(chunks)[chunks.token_chunk]
    total = ratio.new_zeros(len(chunks.weight)).index_add_(0, run, torch.log(ratio))
    count = torch.zeros_like(total).index_add_(0, run, torch.ones_like(ratio))
    return torch.exp(total / count.clamp_min(1.0))[run]


def _runs(chunks: Chunks) -> Tensor:
    """[C] the sequences of the chunks numbered from 0, without gaps."""
    sequence = chunks.sequence
    run = torch.zeros_like(sequence)
    run[1:] = torch.cumsum(sequence[1:] != sequence[:-1], dim=0)
    return run
