"""The losses of a recipe on the logits of one text, without a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np
from torch import Tensor

from mopd.align.canonical import own_next
from mopd.align.payload import teacher_rows
from mopd.api.aligned import AlignedText
from mopd.api.options import (
    TEACHER,
    CtkdOptions,
    GoldOptions,
    KlOptions,
    OpdOptions,
    ProjectionKeywords,
    UldOptions,
    config_of,
)
from mopd.api.projection import TokenProjection
from mopd.api.scores import TopK, scores_of
from mopd.api.text_loss import Call, TextLoss, evaluate
from mopd.errors import ArgumentError
from mopd.runtime.objective import teacher_terms
from mopd.runtime.payloads import pairs, payload_options

Scores = Tensor | TopK


def ctkd_loss(
    student_logits: Tensor,
    teacher: Scores,
    alignment: AlignedText,
    projection: TokenProjection,
    *,
    loss_mask: Tensor | None = None,
    **options: Unpack[CtkdOptions],
) -> TextLoss:
    """Divergence on the teacher's vocabulary at common byte boundaries, with path terms.

    X-Token (arXiv 2605.21699) with fold and path terms; docs/losses.md, CTKD. ``loss_type="hkl"``
    is H-KL.

    Args:
        student_logits: [S, V_S] at temperature 1; row s predicts ``alignment.student_ids[s]``.
        teacher: logits [T, V_T], row t predicts ``alignment.teacher_ids[t]``, or `TopK`.
        loss_mask: [S] bool; a chunk with a token outside it counts nothing.
    Raises:
        ArgumentError: shapes, tokenizers or options that do not fit.
    """
    _check_pair(alignment, projection)
    call = Call(student_logits, alignment, loss_mask)
    return _text_loss("ctkd", call, teacher, options, projection=projection)


def gold_loss(
    student_logits: Tensor,
    teacher: Scores,
    alignment: AlignedText,
    projection: TokenProjection,
    *,
    loss_mask: Tensor | None = None,
    **options: Unpack[GoldOptions],
) -> TextLoss:
    """Divergence on tokens of equal bytes, sorted L1 on the others (GOLD; docs/losses.md).

    Arguments and errors as in `ctkd_loss`.
    """
    _check_pair(alignment, projection)
    call = Call(student_logits, alignment, loss_mask)
    return _text_loss("gold", call, teacher, options, projection=projection)


def uld_loss(
    student_logits: Tensor,
    teacher: Scores,
    alignment: AlignedText,
    projection: TokenProjection,
    *,
    loss_mask: Tensor | None = None,
    **options: Unpack[UldOptions],
) -> TextLoss:
    """L1 of the two sorted distributions, blind to which token is which (arXiv 2402.12030).

    Arguments and errors as in `ctkd_loss`; of the projection the size of the vocabularies counts.
    """
    _check_pair(alignment, projection)
    call = Call(student_logits, alignment, loss_mask)
    return _text_loss("uld", call, teacher, options, projection=projection)


def kl_loss(
    student_logits: Tensor,
    teacher: Scores,
    alignment: AlignedText,
    *,
    loss_mask: Tensor | None = None,
    **options: Unpack[KlOptions],
) -> TextLoss:
    """Divergence of two models of one tokenizer; reverse KL unless ``divergence`` says otherwise.

    Arguments and errors as in `ctkd_loss`; two tokenizers that differ are an error.
    """
    if alignment.student.vocabulary.fingerprint != alignment.teacher.vocabulary.fingerprint:
        raise ArgumentError(
            "kl: student and teacher have different tokenizers; use mopd.ctkd_loss or "
            "mopd.gold_loss with a projection"
        )
    return _text_loss("kl", Call(student_logits, alignment, loss_mask), teacher, options)


def opd_loss(
    student_logits: Tensor,
    teacher: Scores,
    alignment: AlignedText,
    *,
    sampling_logprobs: Tensor | None = None,
    sampling_temperature: float = 1.0,
    loss_mask: Tensor | None = None,
    **options: Unpack[OpdOptions],
) -> TextLoss:
    """Policy gradient of the reverse KL on the sampled tokens, across tokenizers by chunk.

    MiMo-V2-Flash, eqs. 7 and 8; docs/losses.md. The value is no divergence, its gradient is the
    policy gradient, and ``kl`` estimates the reverse KL.

    Args:
        sampling_logprobs: [S] of the sampled tokens, by the policy that sampled them; None: the
            student is that policy.
        sampling_temperature: at which they were sampled.
    Other arguments and errors as in `ctkd_loss`.
    """
    call = Call(student_logits, alignment, loss_mask)
    if sampling_logprobs is None:
        sampled = call.token_logprobs(sampling_temperature)
    else:
        sampled = sampling_logprobs.detach().cpu().double().numpy()
    if sampled.shape != alignment.student_ids.shape:
        raise ArgumentError(
            f"sampling_logprobs: [{len(alignment.student_ids)}] is wanted, one for each of "
            f"student_ids, got {list(sampled.shape)}"
        )
    return _text_loss("opd", call, teacher, options, sampled=(sampled, sampling_temperature))


def _check_pair(alignment: AlignedText, projection: TokenProjection) -> None:
    for side in ("student", "teacher"):
        aligned, projected = getattr(alignment, side), getattr(projection, side)
        if aligned.vocabulary.fingerprint != projected.vocabulary.fingerprint:
            raise ArgumentError(
                f"projection: built for the {side} tokenizer {projected.name}, and the text is "
                f"aligned with {aligned.name}; build one with mopd.build_projection"
            )


def _text_loss(
    name: str,
    call: Call,
    teacher: Scores,
    options: Mapping[str, Any],
    *,
    projection: TokenProjection | None = None,
    sampled: tuple[np.ndarray, float] | None = None,
) -> TextLoss:
    """``sampled``: the sampler's log-probabilities [S] and temperature."""
    keywords = dict(options)
    if name == "ctkd" and projection is not None:
        keywords = {**projection.keywords, **keywords}
        _check_keywords(projection, keywords)
    config = config_of(
        name,
        keywords,
        top_k=teacher.ids.shape[-1] if isinstance(teacher, TopK) else None,
        sampling_temperature=None if sampled is None else sampled[1],
    )
    alignment = call.alignment
    found = pairs(
        config,
        {} if projection is None else {TEACHER: projection.matrix},
        student=alignment.student.vocabulary,
        teachers={TEACHER: alignment.teacher.vocabulary},
    )
    payload = payload_options(
        config,
        found[TEACHER],
        student=alignment.student.vocabulary,
        teacher=alignment.teacher.vocabulary,
    )
    rows = teacher_rows(
        scores_of(teacher, alignment, temperature=config.distillation.temperature),
        alignment.found.alignment,
        student_ids=alignment.student_ids,
        trainable=alignment.found.trainable(call.mask()),
        options=payload,
        canonical_ids=_own_next(alignment) if payload.path and payload.path.canonical else None,
        sampling_logprobs=None if sampled is None else sampled[0],
    )
    logits = call.student_logits
    terms = teacher_terms(config, found, start=0, end=logits.shape[1], device=logits.device)
    return evaluate(call, rows, terms[TEACHER], config.distillation.normalization)


def _own_next(alignment: AlignedText) -> np.ndarray:
    """[S] the student's own next tokens, for ``canonical_paths``."""
    vocabulary, ids = alignment.student.vocabulary, alignment.student_ids
    ended = len(ids) > 0 and int(ids[-1]) == vocabulary.eos_id
    return own_next(vocabulary, vocabulary.decode(ids), vocabulary.byte_ends(ids), ended=ended)


def _check_keywords(projection: TokenProjection, keywords: Mapping[str, Any]) -> None:
    """The loss reads the projection's own keywords and takes no others."""
    for name in ProjectionKeywords.__annotations__:
        if keywords.get(name) != projection.keywords.get(name):
            raise ArgumentError(
                f"{name}={keywords[name]}: belongs to the projection; build it so, with "
                f"mopd.build_projection(student, teacher, {name}=...)"
            )
