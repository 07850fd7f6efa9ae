"""What one student token maps to, in lines that people read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mopd.metrics.text import printable
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import EXACT, MULTI, NULL, SIMILAR, SPECIAL, Projection

_SHOWN = 12  # entries of a list, then a count
_KINDS = {
    NULL: "null",
    EXACT: "exact",
    MULTI: "several pieces",
    SPECIAL: "special",
    SIMILAR: "similar strings",
}


def token_lines(
    token: int, *, student: Vocabulary, teacher: Vocabulary, projection: Projection
) -> list[str]:
    """Kind, teacher pieces with what they fold onto, row of W, and the others in its column."""

    def named(vocabulary: Vocabulary, index: int) -> str:
        if index == projection.teacher_size and vocabulary is teacher:
            return "null"
        text = "end of turn" if index == vocabulary.eos_id else None
        return f"{text or quoted(vocabulary.token_bytes[index])} ({index})"

    data = student.token_bytes[token]
    lines = [f"student token  {named(student, token)}: {_KINDS[int(projection.kind[token])]}"]
    if data and not student.control[token]:
        same = teacher.by_bytes.get(data)
        pieces = teacher.encode(data) if same is None else [same]
        names = [named(teacher, piece) for piece in pieces]
        lines.append(f"teacher pieces {listed(names) if names else 'none'}")
        for piece in pieces:
            column = int(projection.fold[piece])
            if column != piece:
                lines.append(f"fold           {named(teacher, piece)} -> {named(teacher, column)}")
    begin, end = int(projection.crow[token]), int(projection.crow[token + 1])
    row = sorted(range(begin, end), key=lambda entry: -projection.val[entry])
    weights = [f"{named(teacher, int(projection.col[e]))} {projection.val[e]:.4f}" for e in row]
    lines.append(f"row of W       {listed(weights)}")
    column = int(projection.col[row[0]])
    rows = np.repeat(np.arange(projection.student_size), np.diff(projection.crow))
    fibre = [int(i) for i in rows[projection.col == column] if i != token]
    lines.append(
        f"fibre          {len(fibre)} other student tokens in column {named(teacher, column)}"
        + (f": {listed([named(student, i) for i in fibre])}" if fibre else "")
    )
    return lines


def token_row(token: int, *, teacher: Vocabulary, projection: Projection) -> dict[str, Any]:
    """A student token's row of W, for programs; the null column has no text."""
    row = slice(int(projection.crow[token]), int(projection.crow[token + 1]))
    columns, weights = projection.col[row].tolist(), projection.val[row].tolist()
    entries = [
        {
            "teacher": column,
            "text": None
            if column == projection.teacher_size
            else quoted(teacher.token_bytes[column]),
            "weight": weight,
        }
        for column, weight in zip(columns, weights, strict=True)
    ]
    return {"student": token, "kind": _KINDS[int(projection.kind[token])], "row": entries}


def quoted(data: bytes) -> str:
    """Bytes as a quoted, escaped text."""
    text = data.replace(b"\\", b"\\\\").decode(errors="backslashreplace")
    return f'"{printable(text)}"'


def listed(names: Sequence[str]) -> str:
    """Names with commas, cut after a dozen."""
    more = f", ... {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
