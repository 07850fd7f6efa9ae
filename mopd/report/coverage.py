"""The coverage audit of each projection of a run, where its tokenizers can still be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopd.errors import MopdError
from mopd.report.read import RunData, section

UNPROJECTED = ("kl", "opd")  # losses that need no projection


@dataclass(frozen=True, slots=True, kw_only=True)
class CoverageRow:
    """One class of characters; shares of its student tokens by the kind of their row."""

    name: str
    tokens: int
    exact: float
    multi: float
    null: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherCoverage:
    """``problem`` says in words why there are no rows."""

    teacher: str
    rows: tuple[CoverageRow, ...] = ()
    unreachable: float | None = None  # share of the teacher's tokens that no student token reaches
    recommendation: str = ""
    reason: str = ""
    problem: str = ""


def coverage_of(run: RunData) -> list[TeacherCoverage]:
    """Of every teacher with a projection; reads tokenizers, no model."""
    default = section(run.config, "distillation").get("loss")
    vocabularies: dict[tuple[str, str | None], Any] = {}
    found = []
    for name, settings in section(run.config, "teachers").items():
        if (settings.get("loss") or default) in UNPROJECTED or not settings.get("weight", 1.0):
            continue
        if section(settings, "backend").get("type") == "self":
            continue
        try:
            found.append(_audited(name, settings, run, vocabularies))
        except (MopdError, OSError, ValueError, KeyError) as error:
            reason = str(error).strip().split("\n")[0]
            found.append(TeacherCoverage(teacher=name, problem=reason))
    return found


def _audited(
    name: str, settings: Mapping[str, Any], run: RunData, vocabularies: dict[Any, Any]
) -> TeacherCoverage:
    # transformers comes with these
    from mopd.config.schema import CtkdSection
    from mopd.projection import ProjectionOptions, build_projection
    from mopd.projection.audit import audit

    student = _vocabulary(section(run.config, "student"), vocabularies)
    teacher = _vocabulary(settings, vocabularies)
    ctkd = CtkdSection.model_validate(dict(section(run.config, "ctkd")))
    options = ProjectionOptions(
        max_length=ctkd.max_length, gamma=ctkd.gamma, map=ctkd.map, roles=ctkd.roles
    )
    found = audit(student, teacher, build_projection(student, teacher, options))
    rows = [
        _row(one.name, one.tokens.total, one.tokens.shares())
        for one in found.student
        if one.tokens.total
    ]
    overall = found.overall()
    reach = found.reach().tokens
    return TeacherCoverage(
        teacher=name,
        rows=(*rows, _row("all", overall.total, overall.shares())),
        unreachable=reach.shares()[2],
        recommendation=found.recommendation,
        reason=found.reason,
    )


def _row(name: str, tokens: int, shares: tuple[float, float, float]) -> CoverageRow:
    return CoverageRow(name=name, tokens=tokens, exact=shares[0], multi=shares[1], null=shares[2])


def _vocabulary(settings: Mapping[str, Any], known: dict[Any, Any]) -> Any:
    from mopd.tokens.chat import ChatTokenizer

    path = settings.get("tokenizer") or settings.get("model")
    key = (str(path), settings.get("eos_token"))
    if key not in known:
        if path is None or not Path(path).is_dir():
            raise OSError(f"{path}: the tokenizer is not here")
        known[key] = ChatTokenizer.load(path, eos_token=key[1]).vocabulary
    return known[key]
