"""What twinkle's arguments and script variables mean together."""

from __future__ import annotations

from typing import Any

from mopd.config.peers.rows import Source
from mopd.config.peers.values import items, number, positive, text

CROSS = (
    "vocab_topk",
    "uncommon_topk",
    "reverse_kl",
    "gamma_kl",
    "gamma_uld",
    "kl_loss_weight",
    "ce_loss_weight",
    "dynamic_loss_scaling",
    "projection_topk",
    "exact_token_match_only",
)
CROSS_VARIABLES = (
    "TEACHER_MODEL_IDS",
    "TEACHER_WEIGHTS",
    "STUDENT_SAMPLER_GPUS",
    "LOSS_TYPE",
    "MAX_LENGTH_SEQ",
    "MIN_NEW_TOKENS",
    "KL_LOSS_WEIGHT",
    "CE_LOSS_WEIGHT",
)
# lower-case: the loss's own argument; upper-case: the variable of the script
VARIABLES = {
    "max_length": ("CTKD_MAX_LENGTH",),
    "gamma": ("CTKD_GAMMA", "GAMMA"),
    "loss_type": ("CTKD_LOSS_TYPE", "LOSS_TYPE"),
    "temperature": ("CTKD_TEMPERATURE", "TEMPERATURE"),
    "beta": ("CTKD_BETA", "BETA"),
    "reverse_kl": ("REVERSE_KL",),
    "gamma_kl": ("GAMMA_KL",),
    "gamma_uld": ("GAMMA_ULD",),
    "vocab_topk": ("VOCAB_TOPK",),
    "uncommon_topk": ("UNCOMMON_TOPK",),
    "kl_loss_weight": ("KL_LOSS_WEIGHT",),
    "ce_loss_weight": ("CE_LOSS_WEIGHT",),
    "dynamic_loss_scaling": ("DYNAMIC_LOSS_SCALING",),
    "teacher_weights": ("TEACHER_WEIGHTS",),
}


def is_cross(source: Source) -> bool:
    """Whether this is `CrossTokenLoss`, or the script around it."""
    return source.has(*CROSS, *CROSS_VARIABLES)


def is_script(source: Source) -> bool:
    """Whether the file has a script's variables, whose defaults then hold."""
    return any(key.isupper() for key in source.given)


def value_of(source: Source, key: str) -> Any:
    """The argument, or the variable that stands for it."""
    return next(
        (source.get(name) for name in (key, *VARIABLES.get(key, ())) if source.has(name)),
        source.default(key),
    )


def default_of(ctkd: Any, cross: Any, script: Any) -> Any:
    """Of CTKDLoss and its script, of CrossTokenLoss, of the script around that."""
    return lambda source: (script if is_script(source) else cross) if is_cross(source) else ctkd


def is_hkl(source: Source) -> bool:
    return value_of(source, "loss_type") == "hkl"


def is_pkl(source: Source) -> bool:
    return not is_hkl(source)


def is_averaged(source: Source) -> bool:
    return is_cross(source) and is_pkl(source)


def is_dynamic(source: Source) -> bool:
    return str(value_of(source, "dynamic_loss_scaling")).lower() in ("true", "1", "yes")


def loss_type(value: Any, source: Source) -> str:
    if value not in ("pkl", "hkl", "auto"):
        raise ValueError("pkl or hkl is expected")
    return value


def kind(value: Any, source: Source) -> str:
    return "reverse_kl" if str(value).lower() in ("true", "1", "yes") else "forward_kl"


def sorted_weight(value: Any, source: Source) -> float:
    """Their terms weigh gamma_kl, gamma_uld and what is left of 1; ours 1 and lambda_uld."""
    common, unmatched = number(value_of(source, "gamma_kl")), number(value_of(source, "gamma_uld"))
    if common <= 0:
        raise ValueError("a weight of the common term above 0 is expected")
    return (max(0.0, 1.0 - common - unmatched) + unmatched) / common


def balanced(value: Any, source: Source) -> dict[str, Any]:
    if not is_dynamic(source):
        return {"distillation.balance": "fixed"}
    if number(value_of(source, "ce_loss_weight")) <= 0:
        raise ValueError("scales to a cross entropy whose weight is 0")
    return {"distillation.balance": "dynamic"}


def models(source: Source) -> list[Any]:
    if (names := source.get("teacher_model_ids") or source.get("TEACHER_MODEL_IDS")) is not None:
        return [local(name) for name in items(names)]
    found = [source.get(key) for key in ("TEACHER_MODEL_ID", "TEACHER_MODEL_ID_2")]
    return [local(model) for model in found if model is not None] or [None]


def local(value: Any) -> str:
    return text(value).removeprefix("ms://")


def listed(value: Any, source: Source) -> dict[str, Any]:
    return {f"teachers.{{{i}}}.model": model for i, model in enumerate(models(source))}


def weighed(value: Any, source: Source) -> dict[str, Any]:
    weights = [number(weight) for weight in (value if isinstance(value, list) else items(value))]
    if len(weights) != len(models(source)):
        raise ValueError(f"{len(weights)} weights for {len(models(source))} teachers")
    return {f"teachers.{{{i}}}.weight": weight for i, weight in enumerate(weights)}


def local_model(value: Any, source: Source) -> str:
    return local(value)


def batch_size(source: Source) -> int:
    return positive(source.get("batch_size") or source.get("BATCH_SIZE"))


def prompts(value: Any, source: Source) -> int:
    size = batch_size(source)
    times = source.get("gradient_accumulation_steps")
    return size * positive(times or source.get("GRADIENT_ACCUMULATION_STEPS"))
