"""An alignment as two rows that people read: on a terminal, and in a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from mopd.metrics.text import printable

# Tokens of the student, tokens of the teacher, and whether a loss sees them.
Column = tuple[Sequence[str], Sequence[str], bool]
WIDTH = 96


def as_text(heading: str, columns: Sequence[Column]) -> str:
    """Two rows of [tokens], a column for each chunk; ``!`` marks columns that are not aligned."""
    lines = [heading]
    for part in _wrapped(columns):
        ours, theirs = ["student"], ["teacher"]
        for student, teacher, kept in part:
            pair = [_bracketed(student), _bracketed(teacher)]
            width = max(map(len, pair))
            mark = " " if kept else "!"
            ours.append(mark + pair[0].ljust(width))
            theirs.append(mark + pair[1].ljust(width))
        lines += ["", " |".join(ours).rstrip(), " |".join(theirs).rstrip()]
    return "\n".join(lines)


def as_html(heading: str, columns: Sequence[Column]) -> str:
    """The same as a table; every text from a tokenizer is escaped."""
    style = "border:1px solid #888;padding:2px 6px;text-align:left;font-family:monospace"
    rows = []
    for name in ("student", "teacher"):
        cells = [f"<th>{name}</th>"]
        for student, teacher, kept in columns:
            shade = "" if kept else ";background:#f5c6c6;color:#000"
            text = escape(_bracketed(student if name == "student" else teacher))
            cells.append(f'<td style="{style}{shade}"><pre style="margin:0">{text}</pre></td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div style="overflow-x:auto"><p>{escape(heading)}</p><table>{"".join(rows)}</table></div>'
    )


def _bracketed(tokens: Sequence[str]) -> str:
    return "".join(f"[{printable(token)}]" for token in tokens)


def _wrapped(columns: Sequence[Column]) -> Iterator[list[Column]]:
    """Runs of columns that fit on a line."""
    part: list[Column] = []
    used = 0
    for column in columns:
        width = 3 + max(len(_bracketed(column[0])), len(_bracketed(column[1])))
        if part and used + width > WIDTH - len("student"):
            yield part
            part, used = [], 0
        part.append(column)
        used += width
    if part:
        yield part
