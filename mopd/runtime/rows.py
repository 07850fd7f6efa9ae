"""Rows of data files, one at a time: JSON lines, Parquet and Arrow, always from local disks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopd.config.data_files import find_files, format_of
from mopd.errors import ConfigError

FILE_MAGIC = b"ARROW1"  # begins an Arrow file, of which streams are the other kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """``where`` is file and line (or row, from 1) for errors; ``name`` stands in for an id."""

    values: Mapping[str, Any]
    where: str
    name: str


def read_rows(
    path: str, *, columns: Sequence[str] = (), cache: Path | None = None
) -> Iterator[Row]:
    """The rows of a file, a directory or a pattern, in order of file names.

    JSON lines are read a file at a time. Parquet and Arrow are mapped into memory by the datasets
    library: a row costs memory while it is looked at (Parquet is first converted, once, into the
    library's cache on disk).

    Args:
        columns: that Parquet and Arrow files must have.
        cache: where the library converts Parquet; None: its own place.
    Raises:
        ConfigError: file and line or row, and what is wrong there.
    """
    root = Path(path)
    files = find_files(path)
    if not files:
        raise ConfigError(f"{path}: no such file, directory or pattern; nothing is downloaded")
    for file in files:
        # one file names its rows by its stem, several by their paths as well
        inside = file.relative_to(root) if root.is_dir() else file if len(files) > 1 else file.name
        stem = Path(inside).with_suffix("").as_posix()
        rows = _lines(file) if format_of(file) == "jsonl" else _mapped(file, columns, cache)
        for number, values in rows:
            yield Row(values=values, where=f"{file}:{number}", name=f"{stem}-{number}")


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if line.strip():
            yield number, _parse(line, f"{file}:{number}")


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from None


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also of numbers too long, and of too deep
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise ConfigError(f"{where}: not JSON ({reason}); one object a line is expected") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: a JSON object with 'messages' is expected")
    return row


def _mapped(
    file: Path, columns: Sequence[str], cache: Path | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    table = _table(file, cache)
    for column in columns:
        if column not in table.column_names:
            has = ", ".join(table.column_names)
            raise ConfigError(
                f"{file}: no column {column!r} (it has {has}); name the right one in data.*_key"
            )
    yield from enumerate(table, start=1)


def _table(file: Path, cache: Path | None) -> Any:
    """A `datasets.Dataset`, mapped from disk."""
    try:
        from datasets import Dataset, disable_progress_bars
        from datasets.exceptions import DatasetGenerationError
        from datasets.table import InMemoryTable
        from pyarrow import ArrowInvalid, ipc, memory_map
    except ImportError as error:  # the recipe's check says so first
        raise ConfigError(
            f"{file}: the datasets library reads this; pip install 'mopd[data]'"
        ) from error
    disable_progress_bars()
    try:
        if format_of(file) == "parquet":
            place: Any = {} if cache is None else {"cache_dir": str(cache)}
            return Dataset.from_parquet(str(file), **place)
        with file.open("rb") as opened:
            is_stream = opened.read(len(FILE_MAGIC)) != FILE_MAGIC
        if is_stream:  # the library's own
            return Dataset.from_file(str(file))
        # in memory by name only: the table's buffers lie in the map
        return Dataset(InMemoryTable(ipc.open_file(memory_map(str(file))).read_all()))
    except (ArrowInvalid, DatasetGenerationError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(f"{file}: cannot be read ({reason}); write it again") from error
