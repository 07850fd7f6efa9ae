"""Losses and their options that do not go together."""

from __future__ import annotations

from collections.abc import Iterator

from mopd.config.schema import RunConfig, TeacherSection


def losses_in_use(config: RunConfig) -> set[str]:
    """Names of the losses of the teachers that weigh something."""
    return {
        teacher.loss or config.distillation.loss
        for teacher in config.teachers.values()
        if teacher.weight > 0
    }


def check_losses(config: RunConfig) -> Iterator[str]:
    """One line per mistake: the key, what is wrong, the remedy."""
    used = losses_in_use(config)
    yield from _divergences(config)
    yield from _gold(config)
    yield from _whole_rows(config, used)
    yield from _balance(config)
    if "ctkd" in used:
        yield from _ctkd(config)
    if "opd" in used:
        yield from _opd(config)
        if config.rollout.backend.type == "dataset":
            yield (
                "rollout.backend.type=dataset: opd needs the sampler's log-probabilities, which "
                "answers from the data do not have; set another type, or another loss"
            )
        if config.data.validation_path is not None:
            yield (
                "data.validation_path: opd needs the sampler's log-probabilities, which its rows "
                "do not have; leave it out, or set another loss"
            )
        if config.rollout.lmbda < 1.0:
            yield (
                "rollout.lmbda: opd needs the sampler's log-probabilities, which other answers do "
                "not have; set lmbda=1, or another loss"
            )


def _divergences(config: RunConfig) -> Iterator[str]:
    for name in ("ctkd", "gold", "kl"):
        divergence = getattr(config, name).divergence
        if divergence.top_k_mode == "genkl" and divergence.kind not in ("forward_kl", "reverse_kl"):
            yield (
                f"{name}.divergence.top_k_mode=genkl: is defined for kind=forward_kl and "
                f"reverse_kl, not {divergence.kind}; use tail"
            )


def _gold(config: RunConfig) -> Iterator[str]:
    matched, unmatched = config.gold.matched_weight, config.gold.unmatched_weight
    if (matched is None) != (unmatched is None):
        missing = "matched_weight" if matched is None else "unmatched_weight"
        yield f"gold.{missing}: is not set, but its partner is; set both, or neither"
    if matched == 0 and unmatched == 0:
        yield "gold.matched_weight, gold.unmatched_weight: both are 0; raise one"


def _whole_rows(config: RunConfig, used: set[str]) -> Iterator[str]:
    section = config.distillation
    if section.top_k is not None:
        if section.shared_columns is not None:
            yield (
                "distillation.shared_columns: chooses among whole rows, and top_k cuts them; set "
                "distillation.top_k=null"
            )
        if "kl" in used and config.kl.support != "teacher":
            yield (
                f"kl.support={config.kl.support}: needs the teacher's whole rows; set "
                "distillation.top_k=null"
            )
        return
    if section.shared_columns is not None and "kl" in used and config.kl.support != "teacher":
        yield (
            f"kl.support={config.kl.support}: chooses its own tokens; set "
            "distillation.shared_columns=null"
        )
    for name, teacher in config.teachers.items():
        if teacher.weight > 0 and not _sends_whole_rows(teacher):
            yield (
                f"distillation.top_k: null asks for whole rows, and teachers.{name} with "
                f"backend.type={teacher.backend.type} sends lists; give a number"
            )
    if (
        "kl" in used
        and config.kl.divergence.kind == "akl"
        and config.student.parallel.tensor_model_parallel_size > 1
    ):
        yield (
            "kl.divergence.kind=akl: needs each whole row on one rank; set a number for "
            "distillation.top_k, or tensor_model_parallel_size=1"
        )


def _sends_whole_rows(teacher: TeacherSection) -> bool:
    return teacher.backend.type in ("hf", "megatron", "self", "mopd", "custom")


def _balance(config: RunConfig) -> Iterator[str]:
    section = config.distillation
    if section.distillation_weight == 0 and section.crossentropy_weight == 0:
        yield "distillation.distillation_weight, crossentropy_weight: both are 0; raise one"
    if section.balance == "dynamic" and section.crossentropy_weight == 0:
        yield (
            "distillation.balance=dynamic: scales the losses to the cross entropy, whose weight is "
            "0; raise distillation.crossentropy_weight, or set balance=fixed"
        )
    if section.balance == "dynamic" and (name := _may_be_negative(config)) is not None:
        yield (
            f"distillation.balance=dynamic: compares sizes, and {name} may be negative; set "
            "balance=fixed"
        )


def _may_be_negative(config: RunConfig) -> str | None:
    used = losses_in_use(config)
    for name in ("ctkd", "gold", "kl"):
        if name in used and getattr(config, name).divergence.top_k_mode == "trunc":
            return f"{name}.divergence.top_k_mode=trunc"
    if "ctkd" in used and config.ctkd.merge == "nemo":
        return "ctkd.merge=nemo"
    if "gold" in used and not config.gold.rest_bin:
        return "gold.rest_bin=false"
    return None


def _ctkd(config: RunConfig) -> Iterator[str]:
    section = config.ctkd
    native = section.direction == "pull" or section.merge == "decayed"
    if native and (section.path_terms or section.interior_rows):
        which = "direction=pull" if section.direction == "pull" else "merge=decayed"
        yield (
            f"ctkd.{which}: judges the student's own tokens already; set ctkd.path_terms=false and "
            "ctkd.interior_rows=false"
        )
    if section.canonical_paths and not section.path_terms:
        yield (
            "ctkd.canonical_paths: is about path terms, which are off; set ctkd.path_terms=true, "
            "or leave it out"
        )
    if section.direction == "pull" and section.merge != "boundary":
        yield "ctkd.direction=pull: reads boundary rows only; set ctkd.merge=boundary"
    if section.direction == "pull" and section.unreachable != "fold":
        yield "ctkd.direction=pull: loses no teacher token; set ctkd.unreachable=fold"
    if native and config.distillation.shared_columns is not None:
        yield "distillation.shared_columns: a pull lists the student's tokens; set it to null"
    if section.loss_type == "hkl" and (section.interior_rows or section.unreachable != "fold"):
        yield (
            "ctkd.loss_type=hkl: has no interior rows and folds nothing; set "
            "ctkd.interior_rows=false and ctkd.unreachable=fold"
        )
    if section.learned.enabled and section.map == "exact":
        yield "ctkd.learned.enabled: map=exact leaves nothing to learn; set ctkd.map=pieces"
    if native and section.loss_type != "pkl":
        yield f"ctkd.loss_type={section.loss_type}: has no pull and no decayed sum; set pkl"
    if section.learned.enabled and section.gamma == 0:
        yield (
            "ctkd.learned.enabled: with gamma=0 every row of the projection has one entry and "
            "nothing can be learned; set ctkd.gamma=0.1"
        )
    if section.learned.enabled and (native or section.loss_type != "pkl"):
        yield "ctkd.learned.enabled: is for loss_type=pkl and direction=push; set those"


def _opd(config: RunConfig) -> Iterator[str]:
    section = config.opd
    if section.policy == "old" and config.rollout.temperature != 1.0:
        yield (
            "opd.policy=old: takes the sampler's log-probabilities, which are those of "
            f"temperature {config.rollout.temperature:g}; set policy=current or "
            "rollout.temperature=1"
        )
    lower, upper = section.lower, section.upper
    if (lower is None) != (upper is None):
        missing = "lower" if lower is None else "upper"
        yield f"opd.{missing}: is not set, but its partner is; set both, or neither"
    elif lower is not None and upper is not None and lower > upper:
        yield f"opd.lower: {lower:g} is above opd.upper={upper:g}; swap them"
    if section.importance == "none" and lower is not None:
        yield "opd.lower: is not read with importance=none; set both bounds to null"
    if config.distillation.balance == "dynamic":
        yield (
            "distillation.balance=dynamic: compares sizes of losses, and a policy gradient's value "
            "has none; set balance=fixed"
        )
