"""Mistakes in what of the student learns or is computed again, found before any model is loaded.

No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from mopd.config.adapter import check_adapter
from mopd.config.schema import LoraSection, RecomputeSection, RunConfig


def check_student(config: RunConfig) -> Iterator[str]:
    """Problems of `student.lora`, `.freeze` and `.recompute`, one line each with key and remedy."""
    student = config.student
    for pattern in student.freeze:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"student.freeze: `{pattern}` is not a regular expression ({error}); correct it"
    yield from _recompute(student.recompute)
    if student.lora.rank is None:
        yield from _unread(student.lora)
        return
    if student.freeze:
        yield (
            "student.freeze: with student.lora.rank the model is frozen as a whole; leave one of "
            "them out"
        )
    yield from _targets(student.lora)
    if student.lora.path is not None:
        yield from check_adapter(student.lora)


def _recompute(section: RecomputeSection) -> Iterator[str]:
    default = RecomputeSection()
    for key in ("method", "num_layers"):
        if section.granularity != "full" and getattr(section, key) != getattr(default, key):
            yield (
                f"student.recompute.{key}: is only read with student.recompute.granularity=full; "
                "set that, or drop it"
            )


def _unread(section: LoraSection) -> Iterator[str]:
    default = LoraSection()
    for key in LoraSection.model_fields:
        if getattr(section, key) != getattr(default, key):
            yield f"student.lora.{key}: is only read with student.lora.rank; set that, or drop it"


def _targets(section: LoraSection) -> Iterator[str]:
    names, known = section.target_modules, LoraSection().target_modules
    if not names:
        yield "student.lora.target_modules: is empty, so nothing would learn; name a layer"
    for name in names:
        if name not in known:
            yield (
                f"student.lora.target_modules: `{name}` is not a linear layer of the student; "
                f"choose from {', '.join(known)}"
            )
    if len(set(names)) < len(names):
        yield "student.lora.target_modules: lists a layer twice; give each once"
