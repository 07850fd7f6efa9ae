"""Mistakes in what of the student learns, and how, found before any model is loaded. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mopd.config.adapter import check_adapter
from mopd.config.model_shape import ModelShape
from mopd.config.schema import LoraSection, RecomputeSection, RunConfig, StudentSection


def check_student(config: RunConfig, *, files: bool = True) -> Iterator[str]:
    """Problems of `student.lora`, `freeze` and `recompute`, one line each with key and remedy.

    Without ``files`` the adapter at `student.lora.path` is not looked at.
    """
    student = config.student
    yield from _unread_recompute(student.recompute)
    for pattern in student.freeze:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"student.freeze: `{pattern}` is not a regular expression ({error}); correct it"
    if student.lora.rank is None:
        yield from _unread(student.lora)
        return
    if student.freeze:
        yield (
            "student.freeze: with student.lora.rank the model is frozen as a whole; leave one of "
            "them out"
        )
    yield from _targets(student.lora)
    if student.lora.path is not None and files:
        yield from check_adapter(student.lora)


def check_fit(student: StudentSection, shape: ModelShape) -> Iterator[str]:
    """Keys that do not go with the model of this ``shape``."""
    if student.moe_aux_loss_coeff is not None and shape.moe is None:
        yield (
            "student.moe_aux_loss_coeff: is for a mixture of experts, and student.model is a "
            f"{shape.architecture}; remove it"
        )
    experts = {"gate_proj", "up_proj", "down_proj"}.intersection(student.lora.target_modules)
    if student.lora.rank is not None and shape.moe is not None and experts:
        yield (
            f"student.lora.target_modules: {', '.join(sorted(experts))} are experts in "
            "student.model, which get no adapter; name q_proj, k_proj, v_proj and o_proj only"
        )
    recompute, parallel = student.recompute, student.parallel
    stages = parallel.pipeline_model_parallel_size
    stages *= parallel.virtual_pipeline_model_parallel_size or 1
    layers = shape.num_layers // stages
    if (
        recompute.granularity == "full"
        and recompute.method == "uniform"
        and layers % recompute.num_layers
    ):
        yield (
            f"student.recompute.num_layers={recompute.num_layers}: method=uniform cuts the "
            f"{layers} layers of a stage into blocks of this size; set one that divides them, or "
            "student.recompute.method=block"
        )


def _unread_recompute(section: RecomputeSection) -> Iterator[str]:
    if section.granularity == "full":
        return
    default = RecomputeSection()
    for key in ("method", "num_layers"):
        if getattr(section, key) != getattr(default, key):
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
