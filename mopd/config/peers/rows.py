"""What a table of another trainer's keys is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any


class Unset:
    """The default of a row whose key has none, or none that a recipe has to repeat."""


UNSET = Unset()


class Source:
    """The keys of one file, with their trainer's defaults behind them.

    Args:
        given: dotted key -> value, as the file has it; null counts as not set.
        defaults: key -> value, or a function of this source.
        processes: data-parallel processes of their launch, for batches counted per process.
    """

    def __init__(
        self, given: Mapping[str, Any], defaults: Mapping[str, Any], *, processes: int = 1
    ) -> None:
        self.given = given
        self.processes = processes
        self._defaults = defaults

    def has(self, *keys: str) -> bool:
        """Whether the file sets one of ``keys`` to something."""
        return any(self.given.get(key) is not None for key in keys)

    def get(self, key: str) -> Any:
        """The file's value, else the default, else None."""
        value = self.given.get(key)
        return self.default(key) if value is None else value

    def default(self, key: str) -> Any:
        """Their default of ``key``; None where it has none. Numbers in lists stand for all."""
        value = self._defaults.get(key, self._defaults.get(re.sub(r"\.\d+\.", ".*.", key)))
        return value(self) if callable(value) else value

    def indices(self, name: str) -> list[int]:
        """Positions of the list ``name`` that the file has, as 0 and 1 of teachers.1.weight."""
        found = {re.match(rf"{re.escape(name)}\.(\d+)\.", key) for key in self.given}
        return sorted({int(match[1]) for match in found if match})


Convert = Callable[[Any, Source], Any]
Condition = Callable[[Source], bool]


def same(value: Any, source: Source) -> Any:
    return value


def always(source: Source) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Row:
    """One of their keys, or one of several rows of it: all whose ``when`` holds are applied.

    A row without ``target`` drops its key, and ``note`` says why. One with both carries it over
    with another meaning. ``to`` raises ValueError with the reason why a value cannot be carried.
    """

    key: str  # dotted; `*` stands for a position in a list, `**` for whatever is behind
    target: str | None = None  # ours; {teacher} is a name; `*`: ``to`` returns targets and values
    to: Convert = same
    _: KW_ONLY
    default: Any = UNSET  # theirs, or a function of the source
    when: Condition = always
    note: str = ""
    lost: Callable[[Any], bool] = lambda value: False  # whether the recipe is another one without
    shown: str = ""  # for documents, where target is `*`

    @property
    def place(self) -> str:
        """What documents name as ours."""
        return self.shown or (self.target or "").replace("{teacher}", "<name>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One trainer: its table, and what it does without a key.

    Attributes:
        rows: its keys; of two patterns that fit a key the earlier one counts.
        ways: what it always does and mopd does not by default; their ``key`` says it in words.
        marks: patterns of keys that no other trainer here has.
        teachers: names of the teachers of a file, in order.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    ways: tuple[Row, ...]
    marks: tuple[str, ...]
    teachers: Callable[[Source], list[str]]

    def defaults(self) -> dict[str, Any]:
        return {row.key: row.default for row in self.rows if row.default is not UNSET}

    def rows_of(self, key: str) -> list[Row]:
        """All rows of the first pattern that fits ``key``."""
        pattern = next((row.key for row in self.rows if fits(row.key, key)), None)
        return [row for row in self.rows if row.key == pattern]

    def marked(self, keys: Sequence[str]) -> list[str]:
        """Those of ``keys`` that tell this trainer from the others."""
        return [key for key in keys if any(fits(mark, key) for mark in self.marks)]


def fits(pattern: str, key: str) -> bool:
    """Whether ``key`` is what ``pattern`` describes: teachers.*.weight, loss_fn.**, CTKD_**."""
    parts = {"*": r"\d+", "**": r".+"}
    return (
        re.fullmatch(
            "".join(
                parts.get(p, re.escape(p)) for p in re.split(r"(\*\*|(?<![^.])\*(?![^.]))", pattern)
            ),
            key,
            re.DOTALL,
        )
        is not None
    )


def drops(note: str, *keys: str) -> tuple[Row, ...]:
    """Rows of keys that say nothing about what is learned."""
    return tuple(Row(key, note=note) for key in keys)
