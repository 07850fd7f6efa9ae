"""Columns of text."""

from __future__ import annotations

from mopd.cli.table import table


def test_columns_are_aligned_and_nothing_trails() -> None:
    rows = [("name", "n", "what"), ("a", "10", "x"), ("longer", "9", "")]
    assert table(rows, right=(1,)).splitlines() == [
        "name     n  what",
        "a       10  x",
        "longer   9",
    ]


def test_names_from_files_cannot_steer_a_terminal() -> None:
    assert "\x1b" not in table([("id",), ("\x1b[31mred\n",)])
    assert len(table([("id",), ("two\nlines",)]).splitlines()) == 2
