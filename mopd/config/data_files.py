"""Which files a data path names, and of what format. No torch, and nothing is opened."""

from __future__ import annotations

import glob
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mopd.config.schema import DataSection, RunConfig

Format = Literal["jsonl", "parquet", "arrow"]
FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
# what `Dataset.save_to_disk` writes beside its Arrow files
DESCRIPTIONS = ("state.json", "dataset_info.json", "dataset_dict.json")


def find_files(path: str) -> list[Path]:
    """The files behind a path, a directory (searched whole) or a glob pattern, in order of name.

    Directories list files of known formats only, without hidden ones.
    """
    place = Path(path)
    if place.is_dir():
        return sorted(file for file in place.rglob("*") if _is_data(file.relative_to(place), file))
    if place.exists():
        return [place]
    return sorted(Path(found) for found in glob.glob(path, recursive=True) if Path(found).is_file())


def format_of(file: Path) -> Format:
    """By the name's ending; JSONL where it says nothing."""
    return FORMATS.get(file.suffix.lower(), "jsonl")


def check_data_path(key: str, path: str | None) -> Iterator[str]:
    """Problems of one data path, with the key and the remedy. Paths are never downloaded."""
    if path is None:
        return
    files = find_files(path)
    if not files:
        if Path(path).is_dir():
            known = ", ".join(sorted(FORMATS))
            yield f"{key}: the directory {path} has no data ({known}); correct it"
        else:
            yield (
                f"{key}: {path} is not a file, and no directory or pattern with files; correct it "
                "(it must be local: nothing is downloaded)"
            )
        return
    formats = {format_of(file) for file in files}
    if len(formats) > 1:
        yield (
            f"{key}: {path} mixes {' and '.join(sorted(formats))}; name one of them, as in "
            f"{path.rstrip('/')}/*.parquet"
        )
    elif formats != {"jsonl"} and importlib.util.find_spec("datasets") is None:
        yield (
            f"{key}: {path} is {formats.pop()}, which the datasets library reads; "
            "pip install 'mopd[data]', or convert it to JSONL"
        )


def check_data(config: RunConfig, *, files: bool = True) -> Iterator[str]:
    """Problems of `data` but the paths of training and held-out rows, which others look at.

    Without ``files`` the path of validation rows is not looked at either.
    """
    data, default = config.data, DataSection()
    if files:
        yield from check_data_path("data.validation_path", data.validation_path)
    if data.prompt_key is not None and data.messages_key != default.messages_key:
        yield "data.prompt_key: is read instead of data.messages_key; drop one of them"
    if data.prompt_key is not None and data.train_on != default.train_on:
        yield f"data.train_on={data.train_on}: needs turns; drop data.prompt_key"
    if data.train_on != default.train_on and not answers_come_with_data(config):
        yield (
            f"data.train_on={data.train_on}: is only read where answers come with the data; set "
            "rollout.backend.type=dataset, or leave the key out"
        )


def answers_come_with_data(config: RunConfig) -> bool:
    """Whether any answer that is trained on, or validated with, is a row's own."""
    rollout = config.rollout
    mixed = rollout.lmbda < 1.0 and rollout.off_policy == "dataset"
    return rollout.backend.type == "dataset" or mixed or config.data.validation_path is not None


def _is_data(relative: Path, file: Path) -> bool:
    hidden = any(part.startswith(".") for part in relative.parts)
    known = file.suffix.lower() in FORMATS and file.name not in DESCRIPTIONS
    return known and not hidden and file.is_file()
