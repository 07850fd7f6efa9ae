"""An audit as a picture: stacked bars per character class, written as SVG by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from mopd.projection.audit import Audit

COLORS = ("#3b7dd8", "#f0a53a", "#b8bcc4")
_LABEL, _BAR, _COUNT, _ROW = 110, 460, 130, 24  # widths, and the height of a row, in pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One row: parts of 1 from left to right, and a note at its end."""

    label: str
    shares: tuple[float, ...]
    note: str


def plot_audit(audit: Audit) -> str:
    """The text of an SVG file: the student's classes, the teacher's, and the text's if any."""
    kinds, columns = ("exact", "several pieces", "null"), ("own", "folded", "null")
    panels = [
        _panel(
            "Student tokens: what their row is",
            kinds,
            [
                Bar(label=row.name, shares=row.tokens.shares(), note=f"{row.tokens.total} tokens")
                for row in audit.student
                if row.tokens.total
            ],
        )
    ]
    met = [(row.name, row.text) for row in audit.student if row.text is not None and row.text.total]
    if met:
        panels.append(
            _panel(
                "Student tokens of the text, by frequency",
                kinds,
                [
                    Bar(label=name, shares=text.shares(), note=f"{text.total} in the text")
                    for name, text in met
                ],
            )
        )
    panels.append(
        _panel(
            "Teacher tokens: the column that stands for them",
            columns,
            [
                Bar(label=row.name, shares=row.tokens.shares(), note=f"{row.tokens.total} tokens")
                for row in audit.teacher
                if row.tokens.total
            ],
        )
    )
    reached = [(r.name, r.text) for r in audit.teacher if r.text is not None and r.text.total]
    if reached:
        panels.append(
            _panel(
                "Teacher tokens of the text, by frequency",
                columns,
                [
                    Bar(label=name, shares=text.shares(), note=f"{text.total} in the text")
                    for name, text in reached
                ],
            )
        )
    return _document(panels)


def _panel(title: str, kinds: Sequence[str], bars: Sequence[Bar]) -> tuple[list[str], int]:
    """Elements of one panel with its top at 0, and its height."""
    parts = [_text(0, 16, title, bold=True)]
    x = _LABEL
    for kind, color in zip(kinds, COLORS, strict=True):
        parts += [_box(x, 26, 12, 12, color=color), _text(x + 18, 36, kind)]
        x += 130
    top = 48
    for bar in bars:
        parts.append(_text(0, top + 15, bar.label))
        x = float(_LABEL)
        for share, color in zip(bar.shares, COLORS, strict=True):
            if share > 0:
                parts.append(_box(x, top, share * _BAR, _ROW - 6, color=color))
            x += share * _BAR
        parts.append(_text(_LABEL + _BAR + 8, top + 15, bar.note))
        top += _ROW
    return parts, top + 20


def _document(panels: Sequence[tuple[list[str], int]]) -> str:
    margin, body = 16, []
    top = margin
    for parts, height in panels:
        body += [f'<g transform="translate({margin},{top})">', *parts, "</g>"]
        top += height
    width = _LABEL + _BAR + _COUNT + 2 * margin
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" '
        f'viewBox="0 0 {width} {top}" font-family="sans-serif" font-size="13">'
    )
    return "\n".join([head, _box(0, 0, width, top, color="#ffffff"), *body, "</svg>", ""])


def _box(x: float, y: float, width: float, height: float, *, color: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{color}"/>'
    )


def _text(x: float, y: float, text: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{weight} fill="#222222">{escape(text)}</text>'
