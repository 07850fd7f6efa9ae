"""Tables of plain text, for terminals and files alike."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mopd.metrics.text import printable


def table(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Lines of aligned columns, the first row their names; control characters are escaped.

    Args:
        right: columns of numbers, which end at one place.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
