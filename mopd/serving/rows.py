"""From logits to the rows that travel: top-k, tail, actual token, log-sum-exps."""

from __future__ import annotations

import torch
from torch import Tensor

from mopd.serving.scoring import join_rows
from mopd.serving.wire import RawRows

# Elements of one product with the output weight, in float32: 128 MiB, whatever the vocabulary.
BLOCK_ELEMENTS = 1 << 25
# Elements that a CPU core works on at once, so that temporaries stay in its cache.
CACHE_ELEMENTS = 1 << 20
# A tail below this share may have lost terms to underflow.
SMALLEST_TAIL = 1e-30


@torch.no_grad()
def rows_of_logits(
    logits: Tensor, actual: Tensor, *, top_k: int | None, temperature: float
) -> RawRows:
    """Rows of ``logits`` [N, V], padded columns cut off; ``actual`` [N] is what they predict.

    The tail is summed over the tokens outside the top-k, not 1 - sum: it keeps its digits when the
    top-k holds nearly everything, and is -inf when K = V.
    """
    size = len(logits)
    if logits.device.type == "cpu":
        size = max(1, CACHE_ELEMENTS // logits.shape[1])
    parts = [
        _rows(
            logits[begin : begin + size].float(),
            actual[begin : begin + size],
            top_k=top_k,
            temperature=temperature,
        )
        for begin in range(0, max(1, len(logits)), max(1, size))  # one empty part when N = 0
    ]
    return join_rows(parts)


def _rows(logits: Tensor, actual: Tensor, *, top_k: int | None, temperature: float) -> RawRows:
    top, ids = logits.topk(1 if top_k is None else min(top_k, logits.shape[1]), dim=-1)
    likeliest = ids[:, :1]
    probs = torch.softmax(logits, dim=-1)
    lse, total = _log_sum_exp(probs, likeliest, top[:, 0])
    if temperature == 1.0:
        lse_tau = lse
    else:
        tempered = torch.softmax(logits / temperature, dim=-1)
        lse_tau, _ = _log_sum_exp(tempered, likeliest, top[:, 0] / temperature)
    if top_k is None:
        tail = torch.full_like(lse, -torch.inf)
    else:
        outside = probs.scatter_(1, ids, 0.0).sum(dim=-1)
        tail = torch.log(outside) - torch.log(total)
        lost = outside < SMALLEST_TAIL
        if bool(lost.any()):
            rest = logits[lost].scatter(1, ids[lost], -torch.inf)
            tail[lost] = torch.logsumexp(rest, dim=-1) - lse[lost]
    values = logits if top_k is None else top
    return RawRows(
        topk_ids=None if top_k is None else ids.to(torch.int32).cpu().numpy(),
        topk_logprobs=(values - lse[:, None]).cpu().numpy(),
        logprobs=(logits.gather(1, actual.long()[:, None])[:, 0] - lse).cpu().numpy(),
        log_tail=tail.cpu().numpy(),
        lse=torch.stack([lse, lse_tau], dim=1).cpu().numpy(),
    )


def _log_sum_exp(probs: Tensor, likeliest: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the logits behind ``probs``, and the sum of ``probs``.

    On a CPU softmax costs a third of logsumexp, but its normaliser is off by up to 4e-5 at large
    vocabularies. The error is one factor per row, so it shows in the sum and cancels here.
    """
    total = probs.sum(dim=-1)
    return top + torch.log(total) - torch.log(probs.gather(1, likeliest)[:, 0]), total
