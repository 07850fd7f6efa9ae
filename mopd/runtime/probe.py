"""Whether engines hold the student's weights: one short text, scored by both.

A version says which weights an engine was given; this says what it made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from mopd.errors import SamplerError
from mopd.tokens.chat import ChatTokenizer

TEXT = "The quick brown fox jumps over the lazy dog, 0 1 2 3 4 5 6 7 8 9."
MAX_TOKENS = 48


def probe_ids(tokenizer: ChatTokenizer) -> np.ndarray:
    """[L] int32: the start of a text that every chat template can render."""
    return tokenizer.prompt_ids(({"role": "user", "content": TEXT},))[:MAX_TOKENS]


@runtime_checkable
class Named(Protocol):
    """A sampler whose engines have names: those of the rows of its last ``probe``."""

    @property
    def probed(self) -> Sequence[str]: ...


def names_of(sampler: object) -> Sequence[str]:
    """For `compare`; none where engines have none."""
    return sampler.probed if isinstance(sampler, Named) else ()


def compare(
    student: np.ndarray,
    engines: np.ndarray | None,
    *,
    tolerance: float,
    names: Sequence[str] = (),
) -> float | None:
    """The largest distance of an engine's mean log-probability from the student's.

    A mean over the text, in which the rounding of reduced precision cancels out.

    Args:
        student: [L - 1], engines: [E, L - 1]; None: nothing to compare.
        names: of the engines, if they have any.
    Raises:
        SamplerError: more than ``tolerance`` apart.
    """
    if engines is None:
        return None
    own, theirs = float(student.mean()), engines.mean(axis=1)
    worst = int(np.abs(theirs - own).argmax())
    distance = abs(float(theirs[worst]) - own)
    if not distance <= tolerance:
        raise SamplerError(
            f"rollout.backend: after an update {_name(worst, names)} gives a fixed text a mean "
            f"log-probability of {theirs[worst]:.5f} and the student {own:.5f}; look for another "
            "model, dtype or quantisation in the engine, or raise rollout.backend.probe_tolerance"
        )
    return distance


def _name(engine: int, names: Sequence[str]) -> str:
    return names[engine] if engine < len(names) else f"engine {engine}"
