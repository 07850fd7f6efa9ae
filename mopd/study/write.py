"""Tables and plots of a study as files."""

from __future__ import annotations

from pathlib import Path

from mopd.errors import ConfigError
from mopd.metrics.text import printable, replace_file
from mopd.study.plot import plot_group
from mopd.study.results import Raw
from mopd.study.spec import Study
from mopd.study.table import (
    arms_of,
    domains_of,
    group_table,
    of_arm,
    outcome_columns,
    replace_marked,
)


def write_tables(study: Study, raw: Raw, *, output: Path, document: Path | None) -> list[Path]:
    """``<output>/<group>.svg`` and ``table.md``, and the marked tables of ``document``.

    Groups of which no arm has a result are left out. Returns what was written.

    Raises:
        ConfigError: ``document`` is not there.
    """
    present = {result.arm for result in raw.results.values()}
    groups = [name for name in study.groups if present.intersection(_own(study, name))]
    tables = {name: group_table(study, raw, name) for name in groups}
    output.mkdir(parents=True, exist_ok=True)
    written = [raw.path, output / "table.md"]
    parts = [f"## {printable(study.groups[n].title)}\n\n{tables[n]}" for n in groups]
    replace_file(written[-1], "\n".join(parts) or "no results\n")
    shown = outcome_columns(domains_of(raw))
    for name in groups:
        arms = {arm: of_arm(raw, arm) for arm in arms_of(study, name)}
        written.append(output / f"{name}.svg")
        replace_file(written[-1], plot_group(study.groups[name].title, arms, shown))
    if document is not None:
        if not document.is_file():
            raise ConfigError(f"--document: {printable(str(document))} does not exist; create it")
        replace_file(document, replace_marked(document.read_text(encoding="utf-8"), tables))
        written.append(document)
    return written


def _own(study: Study, group: str) -> set[str]:
    return {name for name, arm in study.arms.items() if arm.group == group}
