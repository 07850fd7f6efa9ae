"""What NeMo-RL's keys of losses and teachers mean together."""

from __future__ import annotations

from typing import Any

from mopd.config.peers.rows import Source
from mopd.config.peers.values import number, positive, teacher_names, text, truth

PATHS = ("aligner.projection_matrix_path", "projection_matrix_path")
SHARED_PATHS = ("token_aligner.projection_matrix_path", "loss_fn.projection_matrix_path")
OLD_KEYS = ("loss_fn.gold_loss", "loss_fn.xtoken_loss", "token_aligner.enabled", *SHARED_PATHS)
IS_GOLD, IS_RELAXED = truth("loss_fn.gold_loss"), truth("loss_fn.xtoken_loss")
IS_DYNAMIC = truth("loss_fn.dynamic_loss_scaling")
V6 = "loss_fn.prefix_bidir_v3"


def has_prefixes(source: Source) -> bool:
    """Whether the file is of the newer form."""
    return not source.has(*OLD_KEYS)


def projected(source: Source) -> list[bool]:
    """For each teacher whether it has a projection; one without shares the student's tokenizer."""
    indices = source.indices("teachers")
    if not indices:
        return [True] if source.has(*SHARED_PATHS) or not has_prefixes(source) else [False]
    shared = source.has(*SHARED_PATHS)
    return [shared or source.has(*(f"teachers.{i}.{path}" for path in PATHS)) for i in indices]


def is_projected(source: Source) -> bool:
    return any(projected(source)) and not IS_GOLD(source)


def is_pkl(source: Source) -> bool:
    return is_projected(source) and not has_prefixes(source)


def is_v6(source: Source) -> bool:
    return is_projected(source) and has_prefixes(source)


def is_gold(source: Source) -> bool:
    return any(projected(source)) and IS_GOLD(source) and not IS_RELAXED(source)


def is_hkl(source: Source) -> bool:
    return any(projected(source)) and IS_GOLD(source) and IS_RELAXED(source)


def is_common(source: Source) -> bool:
    return is_gold(source) or is_hkl(source)


def is_direct(source: Source) -> bool:
    """Whether some teacher shares the student's tokenizer."""
    return not all(projected(source))


def losses(value: Any, source: Source) -> dict[str, str]:
    """The loss of each teacher."""
    cross = "gold" if is_gold(source) else "ctkd"
    return {
        f"teachers.{{{i}}}.loss": cross if has else "kl" for i, has in enumerate(projected(source))
    }


def kind(value: Any, source: Source) -> str:
    return "reverse_kl" if truth("loss_fn.reverse_kl")(source) else "forward_kl"


def partition_kind(value: Any, source: Source) -> str:
    kinds = {"kl": "forward_kl", "jsd": "jsd"}
    if not isinstance(value, str) or value not in kinds:
        raise ValueError(f"{text(value)} has no counterpart; kl and jsd have one")
    return kinds[value]


def weight_sum(source: Source) -> float:
    """Theirs are summed as they are, ours are normalised to 1."""
    total = sum(number(source.get(f"teachers.{i}.weight")) for i in source.indices("teachers"))
    return total if source.indices("teachers") else 1.0


def distillation_weight(value: Any, source: Source) -> float:
    return number(value) * weight_sum(source)


def balanced(value: Any, source: Source) -> dict[str, Any]:
    return {
        "distillation.balance": "dynamic",
        "distillation.distillation_weight": 1.0,
        "distillation.crossentropy_weight": 1.0,
    }


def columns(value: Any, source: Source) -> int | None:
    return None if number(value) == 0 else positive(value)


def scored(value: Any, source: Source) -> str:
    scores = {"ce": "nll", "entropy": "entropy", "max_prob": "confidence"}
    if not isinstance(value, str) or value not in scores:
        raise ValueError(f"{text(value)} is not known; ce, entropy and max_prob are")
    return scores[value]


def selects(source: Source) -> bool:
    return source.get("loss_fn.kd_loss_mode") == "select_teacher"


def teachers(source: Source) -> list[str]:
    indices = source.indices("teachers")
    if indices:
        return teacher_names([source.get(f"teachers.{i}.model_name") for i in indices])
    return teacher_names([source.get("teacher.model_name")])
