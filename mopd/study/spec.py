"""A study file: which recipes are compared, with which seeds, and what is asked of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, Field, ValidationError
from yaml import MarkedYAMLError, YAMLError

from mopd.config.check import check_config
from mopd.config.load import load_config
from mopd.config.schema import RunConfig
from mopd.config.section import NonNegativeInt, PositiveFloat, Section
from mopd.errors import ConfigError
from mopd.metrics.text import printable

Fill = Callable[[DictConfig], DictConfig]


def _name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", name):
        raise ValueError("a name has lower-case letters, digits, `_`, `.` and `-` only")
    return name


Name = Annotated[str, AfterValidator(_name)]


class Group(Section):
    """Arms that answer one question, beside each other in one table."""

    title: str
    baseline: tuple[str, ...] = ()  # arms of other groups that stand in the table as well


class Arm(Section):
    """One recipe. ``after``: its student is what that arm ends with, of the same seed."""

    group: str
    recipe: str
    asks: str
    overrides: tuple[str, ...] = ()
    after: str | None = None


class Study(Section):
    """A whole study file. ``limit_s`` is CPU time of a run, so that a busy machine cuts nothing."""

    name: Name
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    limit_s: PositiveFloat = 180.0
    common: tuple[str, ...] = ()  # overrides of every arm, weaker than the arm's own
    groups: dict[Name, Group]
    arms: Annotated[dict[Name, Arm], Field(min_length=1)]

    def chosen(self, pattern: str) -> list[str]:
        """Arms whose name or group matches a shell ``pattern``, and those that they start from.

        Raises:
            ConfigError: there is none.
        """
        found = {
            name
            for name, arm in self.arms.items()
            if fnmatchcase(name, pattern) or fnmatchcase(arm.group, pattern)
        }
        if not found:
            raise ConfigError(
                f"--only {printable(pattern)}: no arm and no group is called so; arms: "
                f"{', '.join(self.arms)}"
            )
        for name in list(found):
            found.update(self.before(name))
        return [name for name in self.arms if name in found]

    def before(self, name: str) -> list[str]:
        """The arms that ``name`` starts from, the nearest first."""
        chain: list[str] = []
        after = self.arms[name].after
        while after is not None and after not in chain:
            chain.append(after)
            after = self.arms[after].after
        return chain


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One arm with one seed; ``config`` names the student of ``after`` by a path to come."""

    arm: str
    seed: int
    config: RunConfig
    overrides: tuple[str, ...]
    after: str | None

    @property
    def name(self) -> str:
        return f"{self.arm}-s{self.seed}"


def load_study(path: Path) -> Study:
    """Read and validate a study file.

    Raises:
        ConfigError: it is no study; the key, the cause and the remedy.
    """
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        cause = printable(_cause(error))
        raise ConfigError(
            f"{printable(str(path))}: is no study file ({cause}); correct it, or name one such as "
            "recipes/study/main.yaml"
        ) from error
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        message = f"{printable(path.name)}: {key}: {first['msg']}; correct that key of the study"
        raise ConfigError(printable(message)) from None
    for problem in _problems(study):
        raise ConfigError(f"{printable(path.name)}: {problem}")
    return study


def _cause(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"not valid YAML, line {error.problem_mark.line + 1}: {error.problem}"
    return str(error).splitlines()[0]


def _problems(study: Study) -> Iterator[str]:
    if len(set(study.seeds)) < len(study.seeds):
        yield "seeds: one is listed twice; give each once"
    for name, arm in study.arms.items():
        if arm.group not in study.groups:
            yield (
                f"arms.{name}.group: `{printable(arm.group)}` is not under groups; "
                f"take one of {', '.join(study.groups)}"
            )
        if arm.after is not None and arm.after not in study.arms:
            yield f"arms.{name}.after: `{printable(arm.after)}` is no arm; name one or none"
    for name in study.arms:
        if name in study.before(name):
            yield f"arms.{name}.after: leads back to itself; leave one `after` of them out"
    for name, group in study.groups.items():
        for arm in group.baseline:
            if arm not in study.arms:
                yield f"groups.{name}.baseline: `{printable(arm)}` is no arm; name one"


def jobs_of(
    study: Study, names: list[str], *, fill: Fill, extra: tuple[str, ...] = ()
) -> list[Job]:
    """Every run of the arms ``names``, seed by seed, an arm behind the one it starts from.

    Args:
        fill: completes recipes that leave paths open, as launch/train.py does.
        extra: overrides that win over all others.
    Raises:
        ConfigError: an arm's recipe cannot run; the arm is named.
    """
    order = sorted(names, key=lambda name: len(study.before(name)))
    return [_job(study, name, seed, fill, extra) for seed in study.seeds for name in order]


def _job(study: Study, name: str, seed: int, fill: Fill, extra: tuple[str, ...]) -> Job:
    arm = study.arms[name]
    overrides = (*study.common, *arm.overrides, *extra)
    words = [*overrides, f"run.seed={seed}", f"run.name={name}-s{seed}"]
    try:
        config = load_config(arm.recipe, words, fill=fill)
        check_config(config, world_size=1)
    except ConfigError as error:
        raise ConfigError(f"arm {name}: {error}") from error
    return Job(arm=name, seed=seed, config=config, overrides=overrides, after=arm.after)


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dots in the keys; an empty mapping is a value."""
    if not isinstance(values, dict) or not values:
        return {prefix.rstrip("."): values}
    return {k: v for name in values for k, v in flat(values[name], f"{prefix}{name}.").items()}
