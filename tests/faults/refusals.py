"""Starts that must be refused: tokenizers with one thing changed, and a start inside a rank."""

from __future__ import annotations

import importlib
import io
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a start came to. ``errors`` are the lines on stderr."""

    code: int
    errors: tuple[str, ...]
    seconds: float


def start_here(overrides: Sequence[str], off: Sequence[str] = ()) -> Start:
    """``launch/train.py`` inside a rank of `tests.helpers.dist`, with detectors switched off.

    Args:
        off: detectors as ``module:Name``; in their place nothing is looked at.
    """
    from launch.train import main

    errors = io.StringIO()
    with ExitStack() as stack:
        for target in off:
            stack.enter_context(_switched_off(target))
        stack.enter_context(redirect_stderr(errors))
        stack.enter_context(redirect_stdout(io.StringIO()))
        begin = time.monotonic()
        code = main(["recipe=mopd_ctkd", *overrides])
        seconds = time.monotonic() - begin
    return Start(code=code, errors=tuple(errors.getvalue().splitlines()), seconds=seconds)


def _switched_off(target: str) -> Any:
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)

    async def looked_at(*args: Any, **more: Any) -> None:
        return None

    blind: Any = {"difference": lambda one, two: 0.0, "check_context": lambda *args: None}
    blind |= {"check_end": lambda *args: None}
    return mock.patch.object(owner, name, blind.get(name, looked_at))


def changed_copy(
    source: Path,
    directory: Path,
    *,
    tokenizer: Callable[[Json], object] | None = None,
    template: Callable[[str], str] | None = None,
    config: Json | None = None,
    tokenizer_config: Json | None = None,
) -> Path:
    """A copy of a model's directory with other files in it."""
    shutil.copytree(source, directory)
    if tokenizer is not None:
        path = directory / "tokenizer.json"
        spec = json.loads(path.read_text())
        tokenizer(spec)
        path.write_text(json.dumps(spec))
    if template is not None:
        path = directory / "chat_template.jinja"
        path.write_text(template(path.read_text()))
    for name, values in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        if values is not None:
            path = directory / name
            path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return directory


def without_a_merge(spec: Json) -> None:
    """The last one: a rare word, which no fixed chat contains."""
    spec["model"]["merges"].pop()


def another_added_token(spec: Json) -> None:
    """One that no chat contains has another text; its id stays."""
    (pad,) = [token for token in spec["added_tokens"] if token["content"] == "<|pad|>"]
    pad["content"] = "<|fim|>"
    vocab = spec["model"]["vocab"]
    vocab["<|fim|>"] = vocab.pop("<|pad|>")


def another_revision(spec: Json) -> None:
    """As many pieces, two of which have changed places."""
    vocab = spec["model"]["vocab"]
    rare = max(vocab, key=lambda piece: vocab[piece])
    vocab[rare], vocab["e"] = vocab["e"], vocab[rare]
