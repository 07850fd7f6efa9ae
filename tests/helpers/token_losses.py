"""Random chunks of sampled tokens, a driver for coupled losses, and a dense policy gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopd.losses.base import Chunks, Coupled
from mopd.losses.opd import OpdLoss
from mopd.losses.rows import blocks
from mopd.losses.source import LogitsSource
from mopd.losses.vocab import VocabShard
from mopd.types import MicroBatch, TeacherRows
from tests.helpers.losses import make_rows
from tests.helpers.random_losses import V_S, problem

WHOLE = VocabShard(start=0, size=V_S, vocab_size=V_S)
ROLLOUTS = [0, 0, 0, 4, 4, 4]  # the sequence of each chunk of `sampled`


@dataclass(frozen=True)
class Sampled:
    """``logits`` [N, V_S] fp64; ``sequence`` [C]."""

    logits: Tensor
    rows: TeacherRows
    sequence: np.ndarray


def sampled(seed: int = 0, *, temperature: float = 1.0, noise: float = 0.6) -> Sampled:
    """Chunks of one to three tokens of two sequences; the sampler is off by ``noise``."""
    case = problem(seed)
    generator = np.random.default_rng(seed + 100)
    rows = case.rows
    logp = torch.log_softmax(case.logits / temperature, dim=-1).numpy()
    own = logp[rows.token_position, rows.token_id]
    chunks = len(rows.chunk_logprob)
    student = np.zeros(chunks)
    np.add.at(student, rows.token_chunk, logp[rows.token_position, rows.token_id])
    return Sampled(
        logits=case.logits,
        rows=replace(
            rows,
            token_sampling_logprob=own + generator.normal(size=len(own)) * noise,
            chunk_logprob=student + generator.normal(size=chunks) * 4.0,
            chunk_size=np.array([(1, 1), (2, 1), (1, 2), (2, 2), (2, 1), (1, 1)], dtype=np.int32),
            chunk_weight=generator.uniform(0.5, 1.5, size=chunks),
        ),
        sequence=np.array(ROLLOUTS),
    )


def token_rows(tokens: list[tuple[int, int, int]], teacher: list[float]) -> TeacherRows:
    """``tokens`` (position, id, chunk); one boundary at each chunk's first token."""
    first = [next(p for p, _, c in tokens if c == chunk) for chunk in range(len(teacher))]
    size = [(sum(c == chunk for _, _, c in tokens), 1) for chunk in range(len(teacher))]
    nothing = np.zeros((len(teacher), 0))
    return make_rows(
        first,
        nothing,
        nothing,
        tokens=tokens,
        chunk_logprob=teacher,
        chunk_size=size,
    )


def build_opd(**options: Any) -> OpdLoss:
    """Every weight open unless told otherwise."""
    given: dict[str, Any] = {
        "importance": "none",
        "bounds": (0.5, 2.0),
        "max_advantage": math.inf,
        "policy": "current",
        "discount": 0.0,
        "iw_gamma": 0.0,
        "sampling_temperature": 1.0,
    }
    return OpdLoss(**given | options)


def chunks_of(rows: TeacherRows, sequence: np.ndarray) -> Chunks:
    def tensor(array: np.ndarray) -> Tensor:
        return torch.as_tensor(array)

    return Chunks(
        token_chunk=tensor(rows.token_chunk),
        token_sampling_logprob=tensor(rows.token_sampling_logprob),
        teacher_logprob=tensor(rows.chunk_logprob),
        size=tensor(rows.chunk_size).long(),
        weight=tensor(rows.chunk_weight),
        owned=tensor(rows.chunk_owned),
        sequence=tensor(sequence),
    )


def joined(loss: OpdLoss, token_logprob: Tensor, rows: TeacherRows, sequence: Any) -> Coupled:
    """`OpdLoss.couple` on given log-probabilities."""
    chunks = chunks_of(rows, np.asarray(sequence))
    plain = token_logprob if token_logprob.dim() == 1 else token_logprob[:, 0]
    total = torch.zeros_like(chunks.teacher_logprob).index_add_(0, chunks.token_chunk, plain)
    return loss.couple(token_logprob, total, chunks)


def run_tokens(
    loss: OpdLoss,
    case: Sampled,
    *,
    logits: Tensor | None = None,
    shard: VocabShard = WHOLE,
    block_size: int = 4,
    scale: float = 1.0,
) -> tuple[Coupled, Tensor]:
    """(the coupled step, ``scale`` times the gradient [N, V_local]) over blocks of rows."""
    logits = case.logits if logits is None else logits
    source, real = LogitsSource(logits, shard), shard.without_padding()
    like = torch.zeros((), dtype=source.dtype)
    cut = list(
        blocks(case.rows, projection=None, with_tokens=True, block_size=block_size, like=like)
    )
    measured = torch.cat([loss.measure(source.read(b), b.rows, real) for b in cut])
    result = joined(loss, measured, case.rows, case.sequence)
    for block in cut:
        out, slope = source.buffer(block), result.token_grad[block.tokens]
        sums = loss.grad(source.read(block), out, block.rows, slope, real, scale=scale)
        assert float(sums.loss) == 0.0
        source.add(block, out)
    return result, source.finish()


def dense_opd(logits: Tensor, case: Sampled, loss: OpdLoss) -> tuple[Tensor, float]:
    """(surrogate with constants detached, kl) from the formulas, token by token."""
    rows = case.rows
    at, ids = rows.token_position, rows.token_id
    plain = torch.log_softmax(logits, dim=-1)[at, ids]
    hot = torch.log_softmax(logits / loss.sampling_temperature, dim=-1)[at, ids]
    mu = rows.token_sampling_logprob
    log_ratio = hot.detach().numpy() - mu
    ratio = np.exp(np.clip(log_ratio, -20.0, 20.0)).tolist()
    members = [np.flatnonzero(rows.token_chunk == c) for c in range(len(rows.chunk_logprob))]
    gaps, advantages = [], []
    for chunk, tokens in enumerate(members):
        pi = mu[tokens].sum() if loss.policy == "old" else float(plain[tokens].detach().sum())
        limit = loss.max_advantage * max(1, len(tokens))
        gaps.append(float(rows.chunk_logprob[chunk]) - pi)
        advantages.append(max(-limit, min(limit, gaps[-1])))
    advantages = _over_the_sequence(advantages, case.sequence, loss)
    total = logits.new_zeros(())
    for t, chunk in enumerate(rows.token_chunk):
        weight = _weight(t, ratio, advantages[chunk], case, loss)
        total = total - float(rows.chunk_weight[chunk]) * weight * advantages[chunk] * hot[t]
    return total, -float(np.dot(rows.chunk_weight, gaps))


def _over_the_sequence(advantages: list[float], sequence: np.ndarray, loss: OpdLoss) -> list[float]:
    weighted = []
    for k, value in enumerate(advantages):
        mates = [j for j in range(len(advantages)) if sequence[j] == sequence[k]]
        before = sum(abs(advantages[j]) for j in mates if j < k)
        whole = sum(abs(advantages[j]) for j in mates)
        weighted.append(value * (1.0 + loss.iw_gamma * (1.0 - before / whole)))
    result = []
    for k in range(len(advantages)):
        later = [j for j in range(k, len(advantages)) if sequence[j] == sequence[k]]
        result.append(sum(loss.discount ** (j - k) * weighted[j] for j in later))
    return result


def _weight(t: int, ratio: list[float], advantage: float, case: Sampled, loss: OpdLoss) -> float:
    low, high = loss.bounds
    if loss.importance == "none":
        return 1.0
    if loss.importance == "tis":
        return min(ratio[t], high)
    if loss.importance == "icepop":
        return ratio[t] if low <= ratio[t] <= high else 0.0
    if loss.importance == "ppo":
        # the slope of min(r A, clip(r) A) in log r, over A
        clipped = max(low, min(high, ratio[t]))
        return ratio[t] if ratio[t] * advantage <= clipped * advantage else 0.0
    own = case.sequence[case.rows.token_chunk]
    mean = math.exp(np.mean([math.log(r) for r, s in zip(ratio, own, strict=True) if s == own[t]]))
    return ratio[t] if low <= mean <= high else 0.0


def sft_micro(seed: int = 0) -> tuple[Tensor, MicroBatch]:
    """(logits [3, 5, V_S] fp64, prompts of different lengths); the second row trains nothing."""
    generator = np.random.default_rng(seed)
    mask = np.zeros((3, 5), dtype=bool)
    mask[0, 1:4], mask[2, 2:4] = True, True
    mask[2, 2] = seed % 2 == 0
    micro = MicroBatch(
        tokens=generator.integers(0, V_S, size=(3, 5)),
        lengths=np.array([5, 3, 5]),
        response_mask=mask,
    )
    return torch.as_tensor(generator.normal(size=(3, 5, V_S)) * 2.0), micro
