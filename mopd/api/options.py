"""The keywords of the losses: a recipe's own keys, with a recipe's own defaults.

A keyword that is not given has the default of `mopd.config.schema`; docs/losses.md says what each
does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypedDict

from pydantic import ValidationError

from mopd.config.check_losses import check_losses
from mopd.config.keys import check_keys
from mopd.config.schema import DivergenceKind, Merge, RunConfig
from mopd.errors import ArgumentError, ConfigError

TEACHER = "teacher"


class DivergenceOptions(TypedDict, total=False):
    """A recipe's ``divergence``: teacher P, student Q, on what the teacher lists."""

    kind: DivergenceKind
    beta: float
    weight: float
    skew: float
    alpha: float
    top_k_mode: Literal["tail", "genkl", "renorm", "trunc"]


class SharedOptions(TypedDict, total=False):
    """A recipe's ``distillation``, as far as one text asks for it."""

    temperature: float
    scale_by_t2: bool
    normalization: Literal["chunk", "token", "sequence"]


class ProjectionKeywords(TypedDict, total=False):
    """Keys of a recipe's ``ctkd`` that shape the projection."""

    map: Literal["pieces", "exact"]
    max_length: int
    gamma: float
    roles: Mapping[str, str]
    similarity: str | None


class HybridOptions(TypedDict, total=False):
    """A recipe's ``ctkd.hkl``."""

    threshold: float | None
    lambda_uld: float
    top_u: int | None
    rest_bin: bool


class CtkdOptions(SharedOptions, total=False):
    """The other keys of a recipe's ``ctkd``."""

    loss_type: Literal["pkl", "hkl", "auto"]
    direction: Literal["push", "pull"]
    merge: Literal[Merge, "decayed"]
    divergence: DivergenceOptions
    unreachable: Literal["fold", "rest", "renorm"]
    path_terms: bool
    canonical_paths: bool
    interior_rows: bool
    lambda_chunk: float
    hkl: HybridOptions


class GoldOptions(SharedOptions, total=False):
    """A recipe's ``gold``."""

    divergence: DivergenceOptions
    matched_weight: float | None
    unmatched_weight: float | None
    top_u: int | None
    rest_bin: bool
    merge: Merge
    lambda_chunk: float


class UldOptions(SharedOptions, total=False):
    """A recipe's ``uld``."""

    top_u: int | None


class KlOptions(SharedOptions, total=False):
    """A recipe's ``kl``."""

    divergence: DivergenceOptions
    support: Literal["teacher", "student", "union"]
    support_top_k: int


class OpdOptions(SharedOptions, total=False):
    """A recipe's ``opd``."""

    importance: Literal["icepop", "tis", "ppo", "sequence_mask", "none"]
    lower: float | None
    upper: float | None
    max_advantage: float
    policy: Literal["current", "old"]
    discount: float
    iw_gamma: float


# what of a section is for a whole run, and no keyword
LEFT_OUT = {"ctkd": ("learned",)}


def config_of(
    loss: str,
    options: Mapping[str, Any],
    *,
    top_k: int | None,
    sampling_temperature: float | None = None,
) -> RunConfig:
    """The recipe of one teacher with this loss; ``options`` are keywords of the loss.

    Raises:
        ArgumentError: an unknown keyword, a value of another type, keywords that contradict.
    """
    shared = {name: options[name] for name in SharedOptions.__annotations__ if name in options}
    own = {name: value for name, value in options.items() if name not in shared}
    for name in LEFT_OUT.get(loss, ()):
        if name in own:
            raise ArgumentError(
                f"{loss}: `{name}` trains over a run; set {loss}.{name} in a recipe instead"
            )
    values: dict[str, Any] = {
        "distillation": {**shared, "loss": loss, "top_k": top_k},
        loss: own,
        "teachers": {TEACHER: {}},
    }
    if sampling_temperature is not None:
        values["rollout"] = {"temperature": sampling_temperature}
    try:
        check_keys(values, origin=f"keyword of mopd.{loss}_loss")
        config = RunConfig.model_validate(values)
    except ConfigError as error:
        raise ArgumentError(str(error)) from None
    except ValidationError as error:
        raise ArgumentError(_one_line(error)) from None
    for problem in _problems(config):
        raise ArgumentError(problem)
    return config


def _problems(config: RunConfig) -> Iterator[str]:
    """What the recipe's own checks say of losses; one text needs none of the rest."""
    yield from check_losses(config)


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    problem = first["msg"].replace("Input should be ", "expected ", 1)
    return f"{key}: {problem[0].lower()}{problem[1:]}, got {first['input']!r}"
