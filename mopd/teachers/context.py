"""A teacher in this job reads so many tokens; what an answer has beyond has no valid row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mopd.teachers.admission import nothing
from mopd.teachers.base import TeacherInput
from mopd.types import TeacherScores


def room(prompt_ids: np.ndarray, wanted: int, max_length: int | None) -> int:
    """Of ``wanted`` tokens behind a prompt [P], those that a model of ``max_length`` reads."""
    if max_length is None:
        return wanted
    return max(0, min(wanted, max_length - len(prompt_ids)))


def cut(x: TeacherInput, max_length: int | None) -> TeacherInput:
    """Its beginning, prompt included."""
    size = room(x.prompt_ids, len(x.token_ids), max_length)
    return replace(
        x,
        prompt_ids=x.prompt_ids[:max_length],
        token_ids=x.token_ids[:size],
        byte_ends=x.byte_ends[:size],
    )


def whole_scores(
    whole: TeacherInput,
    arrays: Mapping[str, np.ndarray | None],
    *,
    valid: np.ndarray,
    who: tuple[str, str],
    vocab_size: int,
) -> tuple[TeacherScores, Counter[str]]:
    """Scores of all tokens from the rows ``arrays`` [t, ...] of the first t; and how many are
    missing by reason.

    Args:
        arrays: `TeacherScores` fields; ``topk_ids`` None where rows hold the whole vocabulary.
        valid: [t] bool.
        who: the teacher's name, its model's fingerprint.
    """
    ids = arrays["topk_ids"]
    rest = nothing(
        len(whole.token_ids) - len(valid),
        None if ids is None else ids.shape[1],
        "context",
        vocab_size=vocab_size,
    )
    joined: dict[str, Any] = {
        name: None if array is None else np.concatenate([array, getattr(rest, name)])
        for name, array in arrays.items()
    }
    scores = TeacherScores(
        teacher=who[0],
        model_fingerprint=who[1],
        token_ids=whole.token_ids,
        byte_ends=whole.byte_ends,
        valid=np.concatenate([valid, rest.valid]),
        **joined,
    )
    return scores, rest.missing
