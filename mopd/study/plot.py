"""A group of arms as SVG: one panel a number, one row an arm, a dot a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from mopd.study.results import Result
from mopd.study.table import Column, Spread

DOT, MEAN, RANGE, GRID = "#4477aa", "#222222", "#bbccdd", "#e4e4e4"
_LABEL, _PANEL, _GAP, _ROW, _TOP = 150, 190, 26, 26, 52


def plot_group(title: str, arms: Mapping[str, Sequence[Result]], columns: Sequence[Column]) -> str:
    """The text of an SVG file. All numbers are shares, on an axis from 0 to 100 %.

    Args:
        arms: name -> results, in the order of the rows.
    """
    width = _LABEL + len(columns) * (_PANEL + _GAP) + 16
    height = _TOP + len(arms) * _ROW + 30
    body = [_text(12, 20, title, bold=True)]
    for number, name in enumerate(arms):
        body.append(_text(12, _TOP + number * _ROW + 17, name))
    for place, column in enumerate(columns):
        x = _LABEL + place * (_PANEL + _GAP)
        body += _panel(x, column, list(arms.values()))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
    )
    back = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, back, *body, "</svg>", ""])


def _panel(x: float, column: Column, rows: Sequence[Sequence[Result]]) -> list[str]:
    bottom = _TOP + len(rows) * _ROW
    parts = [_text(x, _TOP - 10, column.title, bold=True)]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = x + share * _PANEL
        parts.append(
            f'<line x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{bottom}" stroke="{GRID}"/>'
        )
        parts.append(_text(at, bottom + 16, f"{100 * share:.0f}", anchor="middle"))
    for number, results in enumerate(rows):
        y = _TOP + number * _ROW + 13
        parts += _marks(x, y, column, results)
    return parts


def _marks(x: float, y: float, column: Column, results: Sequence[Result]) -> list[str]:
    found = column.of(results)
    if found is None:
        return [_text(x + 4, y + 4, "-")]
    parts = [_range(x, y, found)]
    for result in results:
        value = column.read(result)
        if result.status == "done" and value is not None:
            parts.append(
                f'<circle cx="{_at(x, value):.1f}" cy="{y}" r="3.5" fill="{DOT}" '
                f'fill-opacity="0.75"><title>seed {result.seed}: {100 * value:.1f}</title></circle>'
            )
    at = _at(x, found.mean)
    parts.append(
        f'<line x1="{at:.1f}" y1="{y - 8}" x2="{at:.1f}" y2="{y + 8}" stroke="{MEAN}" '
        'stroke-width="2"/>'
    )
    return parts


def _range(x: float, y: float, found: Spread) -> str:
    begin, end = _at(x, found.lowest), _at(x, found.highest)
    return (
        f'<rect x="{begin:.1f}" y="{y - 3}" width="{max(end - begin, 1.0):.1f}" height="6" '
        f'fill="{RANGE}"/>'
    )


def _at(x: float, share: float) -> float:
    """Headroom may be below 0: that stands at the left edge."""
    return x + min(max(share, 0.0), 1.0) * _PANEL


def _text(x: float, y: float, text: str, *, bold: bool = False, anchor: str | None = None) -> str:
    weight = ' font-weight="bold"' if bold else ""
    place = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{weight}{place} fill="#222222">{escape(text)}</text>'
