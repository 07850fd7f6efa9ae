"""What a teacher said of a text: whole logits, or its likeliest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopd.api.aligned import AlignedText
from mopd.api.options import TEACHER
from mopd.errors import ArgumentError
from mopd.types import TeacherScores


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """A teacher's likeliest tokens, as a server's top log-probabilities give them.

    Args:
        ids: [T, K] integers, -1 where a row lists fewer.
        logprobs: [T, K] at temperature 1, over the whole vocabulary.
        token_logprobs: [T] of the tokens of the text themselves; None where every one of them is
            among its row's.
        log_tail: [T] log of the mass outside the list; None: what is missing to 1.
        lse: [T, 2] log-sum-exp of the logits at 1 and at ``temperature``; None where that is 1.
    """

    ids: Tensor
    logprobs: Tensor
    token_logprobs: Tensor | None = None
    log_tail: Tensor | None = None
    lse: Tensor | None = None
    temperature: float = 1.0


def top_k_of(
    teacher_logits: Tensor, alignment: AlignedText, *, k: int, temperature: float = 1.0
) -> TopK:
    """The ``k`` likeliest tokens of each row of ``teacher_logits`` [T, V_T].

    Args:
        temperature: of the loss that they are for.
    Raises:
        ArgumentError: the logits are not [T, V_T] of this text, or ``k`` is not in 1 to V_T.
    """
    logits = _logits(teacher_logits, alignment)
    if not 1 <= k <= logits.shape[1]:
        raise ArgumentError(f"k={k}: between 1 and the teacher's {logits.shape[1]} tokens")
    lse = [torch.logsumexp(logits / t, dim=-1) for t in (1.0, temperature)]
    log_probs = logits - lse[0][:, None]
    top = log_probs.topk(k, dim=-1)
    actual = torch.as_tensor(alignment.teacher_ids, dtype=torch.int64, device=logits.device)
    return TopK(
        ids=top.indices,
        logprobs=top.values,
        token_logprobs=log_probs.gather(1, actual[:, None])[:, 0],
        log_tail=torch.logsumexp(log_probs.scatter(1, top.indices, -torch.inf), dim=-1),
        lse=torch.stack(lse, dim=1),
        temperature=temperature,
    )


def scores_of(
    teacher: Tensor | TopK, alignment: AlignedText, *, temperature: float
) -> TeacherScores:
    """The teacher's rows as training has them, in float32 on the CPU.

    Raises:
        ArgumentError: shapes that do not match, values that are not finite, a list made for
            another temperature, or a token of the text that neither list nor ``token_logprobs``
            tell of.
    """
    if isinstance(teacher, TopK):
        arrays = _listed(teacher, alignment, temperature=temperature)
    else:
        logits = _logits(teacher, alignment)
        log_probs = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
        ids = torch.as_tensor(alignment.teacher_ids, dtype=torch.int64, device=logits.device)
        arrays = {
            "logprobs": _numpy(log_probs.gather(1, ids[:, None])[:, 0]),
            "topk_ids": None,
            "topk_logprobs": _numpy(log_probs),
            "log_tail": np.full(len(ids), -np.inf, dtype=np.float32),
            "lse": None,
        }
    return TeacherScores(
        teacher=TEACHER,
        model_fingerprint="",
        token_ids=alignment.teacher_ids,
        byte_ends=alignment.teacher_byte_ends,
        valid=np.ones(len(alignment.teacher_ids), dtype=bool),
        **arrays,
    )


def _logits(logits: Tensor, alignment: AlignedText) -> Tensor:
    """[T, V_T] float, without padded columns."""
    size, rows = alignment.teacher.size, len(alignment.teacher_ids)
    check_shape(logits, (rows, size), name="the teacher's logits", tokens="teacher_ids")
    found = logits.detach()[:, :size]
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    if not torch.isfinite(found).all():
        raise ArgumentError(
            "the teacher's logits hold values that are not finite; look at the rows of "
            "torch.isfinite(logits).all(-1) that are False"
        )
    return found


def check_shape(logits: Tensor, wanted: tuple[int, int], *, name: str, tokens: str) -> None:
    """Raises ArgumentError unless ``logits`` are [wanted[0], at least wanted[1]] floats."""
    shape = tuple(logits.shape)
    if not logits.is_floating_point():
        raise ArgumentError(f"{name}: floats are wanted, got {logits.dtype}")
    if len(shape) != 2 or shape[0] != wanted[0]:
        raise ArgumentError(
            f"{name}: [{wanted[0]}, {wanted[1]}] is wanted, a row that predicts each of {tokens}, "
            f"got {list(shape)}; of a model's logits[0] behind a prompt of P tokens take "
            "rows [P - 1 : -1]"
        )
    if shape[1] < wanted[1]:
        raise ArgumentError(
            f"{name}: {shape[1]} columns for a tokenizer of {wanted[1]} tokens; are they of "
            "the other model?"
        )


def _listed(top: TopK, alignment: AlignedText, *, temperature: float) -> dict[str, Any]:
    ids, logprobs = _numpy(top.ids).astype(np.int64), _numpy(top.logprobs)
    wanted = len(alignment.teacher_ids)
    if ids.ndim != 2 or ids.shape != logprobs.shape or len(ids) != wanted:
        raise ArgumentError(
            f"TopK: ids and logprobs are [{wanted}, K], a row for each of teacher_ids, got "
            f"{list(ids.shape)} and {list(logprobs.shape)}"
        )
    if ids.size and (ids.max() >= alignment.teacher.size or ids.min() < -1):
        raise ArgumentError(
            f"TopK.ids: ids of {alignment.teacher.name} are 0 to {alignment.teacher.size - 1} (-1: "
            f"none), got {ids.min()} to {ids.max()}; are they of another tokenizer?"
        )
    logprobs = np.where(ids >= 0, logprobs, -np.inf)
    mass = np.exp(logprobs.astype(np.float64)).sum(axis=1)
    if not (mass <= 1.0 + 1e-3).all():
        raise ArgumentError(
            f"TopK.logprobs: row {int(np.argmax(~(mass <= 1.0 + 1e-3)))} has a mass above 1, or "
            "NaN; give log-probabilities (log_softmax of the logits), each token once"
        )
    if temperature != 1.0 and (top.lse is None or top.temperature != temperature):
        raise ArgumentError(
            f"temperature={temperature}: the list was made for {top.temperature}; make it with "
            f"mopd.top_k_of(..., temperature={temperature}), or leave temperature at 1"
        )
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(1.0 - mass, 0.0))
    if top.log_tail is not None:
        tail = _of_text(top.log_tail, "log_tail", wanted)
    return {
        "logprobs": _token_logprobs(top, ids, logprobs, alignment),
        "topk_ids": ids.astype(np.int32),
        "topk_logprobs": logprobs.astype(np.float32),
        "log_tail": tail.astype(np.float32),
        "lse": None if top.lse is None else _numpy(top.lse).astype(np.float32),
    }


def _token_logprobs(
    top: TopK, ids: np.ndarray, logprobs: np.ndarray, alignment: AlignedText
) -> np.ndarray:
    if top.token_logprobs is not None:
        return _of_text(top.token_logprobs, "token_logprobs", len(ids)).astype(np.float32)
    hit = ids == alignment.teacher_ids[:, None]
    if not hit.any(axis=1).all():
        row = int(np.argmin(hit.any(axis=1)))
        raise ArgumentError(
            f"TopK: token {row} of teacher_ids ({alignment.teacher_ids[row]}) is not among its "
            "row's ids; give token_logprobs, the log-probabilities of the text's own tokens"
        )
    return logprobs[np.arange(len(ids)), hit.argmax(axis=1)].astype(np.float32)


def _of_text(values: Tensor, name: str, wanted: int) -> np.ndarray:
    found = _numpy(values)
    if found.shape != (wanted,) or np.isnan(found).any() or (found > 1e-3).any():
        raise ArgumentError(
            f"TopK.{name}: [{wanted}] logarithms of probabilities are wanted, one for each of "
            f"teacher_ids, got {list(found.shape)}"
        )
    return found


def _numpy(tensor: Tensor) -> np.ndarray:
    found = torch.as_tensor(tensor).detach().cpu()
    if found.is_floating_point():
        found = found.to(torch.promote_types(found.dtype, torch.float32))
    return found.numpy()
