"""Mean and spread over seeds, and the tables of a study in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mopd.metrics.text import printable
from mopd.study.results import Raw, Result
from mopd.study.spec import Study


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Of one number over seeds. ``deviation`` is that of a sample (n - 1), None for one seed."""

    count: int
    mean: float
    lowest: float
    highest: float
    deviation: float | None


def spread(values: Sequence[float]) -> Spread | None:
    """None where there are no values."""
    if not values:
        return None
    mean = sum(values) / len(values)
    deviation = None
    if len(values) > 1:
        squares = sum((value - mean) ** 2 for value in values)
        deviation = math.sqrt(squares / (len(values) - 1))
    return Spread(
        count=len(values),
        mean=mean,
        lowest=min(values),
        highest=max(values),
        deviation=deviation,
    )


Read = Callable[[Result], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a table, or one panel of a plot. ``percent``: shares, shown times 100."""

    title: str
    read: Read
    percent: bool = True

    def of(self, results: Sequence[Result]) -> Spread | None:
        """Over the runs that ended and have the number."""
        values = [self.read(one) for one in results if one.status == "done"]
        return spread([value for value in values if value is not None])


def domains_of(raw: Raw) -> list[str]:
    """Of all results, in alphabetical order."""
    return sorted({name for result in raw.results.values() for name in result.domains})


def outcome_columns(domains: Sequence[str]) -> list[Column]:
    """Accuracy, headroom and canonical share of each domain."""
    kinds = (
        ("accuracy", "after"),
        ("headroom", "headroom_recovered"),
        ("canonical", "canonical_after"),
    )
    return [
        Column(title=f"{title} {domain}", read=_reader(domain, key))
        for title, key in kinds
        for domain in domains
    ]


def _reader(domain: str, key: str) -> Read:
    return lambda result: result.domains.get(domain, {}).get(key)


def columns(domains: Sequence[str]) -> list[Column]:
    """Of the tables."""
    return [
        *outcome_columns(domains),
        Column(title="masked", read=lambda result: result.masked),
        Column(title="CPU s", read=lambda result: result.cpu_seconds, percent=False),
    ]


def of_arm(raw: Raw, arm: str) -> list[Result]:
    """Its results, seed by seed."""
    return [raw.results[key] for key in sorted(raw.results) if key[0] == arm]


def arms_of(study: Study, group: str) -> list[str]:
    """What stands in the table of ``group``: its baseline, then its own arms."""
    own = [name for name, arm in study.arms.items() if arm.group == group]
    return [*study.groups[group].baseline, *own]


def group_table(study: Study, raw: Raw, group: str) -> str:
    """Markdown: what each arm is, and a row of means with deviation and range."""
    domains = domains_of(raw)
    shown = columns(domains)
    head = ["arm", *(column.title for column in shown), "runs"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name in arms_of(study, group):
        results = of_arm(raw, name)
        cells = [cell(column.of(results), percent=column.percent) for column in shown]
        rows.append([f"`{name}`", *cells, _runs(study, results)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *_legend(study, raw, group)]) + "\n"


def cell(found: Spread | None, *, percent: bool) -> str:
    """``mean ± deviation (lowest-highest)``; shares in percent."""
    if found is None:
        return "-"
    scale, digits = (100.0, 1) if percent else (1.0, 0)
    text = f"{found.mean * scale:.{digits}f}"
    if found.deviation is None:
        return text
    low, high = (f"{value * scale:.{digits}f}" for value in (found.lowest, found.highest))
    return f"{text} ± {found.deviation * scale:.{digits}f} ({low}-{high})"


def _runs(study: Study, results: Sequence[Result]) -> str:
    done = sum(result.status == "done" for result in results)
    return f"{done} of {len(study.seeds)}"


def _legend(study: Study, raw: Raw, group: str) -> Iterator[str]:
    for name in arms_of(study, group):
        arm = study.arms[name]
        words = printable(" ".join([arm.recipe, *arm.overrides]))
        after = f", from the student of `{arm.after}`" if arm.after else ""
        yield f"- `{name}`: {printable(arm.asks)} (`{words}`{after})"
        for result in of_arm(raw, name):
            if result.status != "done":
                yield f"  - seed {result.seed} {result.status}: {printable(result.error or '')}"


def replace_marked(text: str, tables: Mapping[str, str]) -> str:
    """``text`` with the part between ``<!-- study:NAME -->`` and ``<!-- /study -->`` replaced.

    Marks of names that ``tables`` lacks are left as they are.
    """
    end = "<!-- /study -->"
    for name, table in tables.items():
        begin = f"<!-- study:{name} -->"
        head, found, rest = text.partition(begin)
        if not found:
            continue
        _, closed, tail = rest.partition(end)
        if closed:
            text = f"{head}{begin}\n\n{table}\n{end}{tail}"
    return text
