"""What a start looks at before anything is loaded, one part after another: all that is wrong.

A run stops at the first mistake (`mopd.runtime.build`); the same functions are called here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

from mopd.config.model_shape import read_model_config
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError, MopdError
from mopd.runtime.build import read_data
from mopd.runtime.data import Router, check_chats
from mopd.runtime.parts import (
    Tokenizers,
    check_tokenizers,
    load_projection,
    load_tokenizer,
    projected,
)
from mopd.runtime.payloads import active_teachers
from mopd.teachers.hf import check_model
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt

Status = Literal["ok", "problem", "warning", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One part of a recipe, by its key, and what was found of it."""

    item: str
    status: Status
    detail: str


def looked_at(item: str, look: Callable[[], str]) -> Finding:
    """``look()`` returns a detail, or raises what is wrong."""
    try:
        return Finding(item=item, status="ok", detail=look())
    except MopdError as error:
        return Finding(item=item, status="problem", detail=str(error))
    except Exception as error:  # of a library: a check tells it, whatever it is
        text = next(iter(str(error).splitlines()), "")
        return Finding(item=item, status="problem", detail=f"{type(error).__name__}: {text}")


def skipped(item: str, why: str) -> Finding:
    return Finding(item=item, status="skipped", detail=why)


@dataclass(slots=True)
class Preflight:
    """`findings` looks, and keeps what later checks need; ``data`` and ``tokenizers`` are None
    where they could not be read."""

    config: RunConfig
    data: dict[str, list[Prompt]] | None = None
    tokenizers: Tokenizers | None = None

    def findings(self) -> Iterator[Finding]:
        """Data, tokenizers, templates, models and projections, in the order of a start."""
        yield looked_at("data", self._read_data)
        yield from self._load_tokenizers()
        yield from self._chats()
        yield looked_at("student.model", self._student)
        for name in active_teachers(self.config):
            yield from self._teacher(name)
        for name in projected(self.config):
            item = f"projection of {name}"
            if self.tokenizers is None:
                yield skipped(item, "needs the tokenizers")
            else:
                yield looked_at(item, lambda name=name: self._projection(name))

    def _read_data(self) -> str:
        config = self.config
        self.data = read_data(config, Router(config.teachers, config.distillation))
        return "; ".join(f"{key}: {_rows(rows)}" for key, rows in self.data.items() if rows)

    def _load_tokenizers(self) -> Iterator[Finding]:
        config = self.config
        found: dict[str, ChatTokenizer] = {}

        def load(key: str) -> str:
            name = key.removeprefix("teachers.")
            section = config.student if key == "student" else config.teachers[name]
            found[key] = load_tokenizer(key, section)
            vocabulary = found[key].vocabulary
            return f"{vocabulary.size} tokens, fingerprint {vocabulary.fingerprint[:12]}"

        own = [n for n, t in active_teachers(config).items() if t.backend.type != "self"]
        keys = ["student", *(f"teachers.{name}" for name in own)]
        for key in keys:
            yield looked_at(f"{key} tokenizer", lambda key=key: load(key))
        if len(found) < len(keys):
            return
        student = found["student"]
        tokenizers = Tokenizers(
            student=student,
            teachers={
                name: found.get(f"teachers.{name}", student) for name in active_teachers(config)
            },
        )
        try:
            check_tokenizers(config, tokenizers)
        except ConfigError as error:
            yield Finding(item="tokenizers", status="problem", detail=str(error))
        self.tokenizers = tokenizers

    def _chats(self) -> Iterator[Finding]:
        item, data, tokenizers = "chat templates", self.data, self.tokenizers
        if data is None or tokenizers is None:
            yield skipped(item, "needs the data and the tokenizers")
            return

        def render() -> str:
            for key, rows in data.items():
                check_chats(
                    key,
                    rows,
                    config=self.config,
                    student=tokenizers.student,
                    teachers=tokenizers.teachers,
                )
            return "the student's and all teachers' take the rows"

        yield looked_at(item, render)

    def _student(self) -> str:
        path = Path(str(self.config.student.model))
        shape = read_model_config(path)
        if self.tokenizers is not None:
            size = self.tokenizers.student.vocabulary.size
            if size > shape.vocab_size:
                raise ConfigError(
                    f"student.tokenizer has {size} tokens and student.model only "
                    f"{shape.vocab_size}; name the tokenizer that belongs to the model"
                )
        return f"{path}: {shape.num_layers} layers, {_weights(path)}"

    def _teacher(self, name: str) -> Iterator[Finding]:
        section, item = self.config.teachers[name], f"teachers.{name}.model"
        tokenizers, path = self.tokenizers, section.model
        kind = section.backend.type
        if kind in ("self", "uniform", "custom"):
            yield skipped(item, f"backend.type={kind} has no files of its own")
        elif kind not in ("hf", "megatron") and section.backend.urls:
            yield skipped(item, "is behind a server: ask it with --live")
        elif tokenizers is None:
            yield skipped(item, "needs the tokenizers")
        else:

            def look() -> str:
                directory = Path(str(path))
                check_model(
                    name,
                    directory,
                    tokenizer=tokenizers.teachers[name],
                    min_length=self.config.rollout.max_new_tokens,
                )
                return f"{directory}: {_weights(directory)}"

            yield looked_at(item, look)

    def _projection(self, name: str) -> str:
        assert self.tokenizers is not None
        begin = perf_counter()
        found = load_projection(self.config, self.tokenizers, name)
        return (
            f"{found.student_size} x {found.teacher_size}, {len(found.col)} weights, "
            f"{perf_counter() - begin:.1f} s"
        )


def _rows(rows: Sequence[Prompt]) -> str:
    """Rows by domain, with the teachers that judge them."""
    count = Counter((prompt.domain, prompt.teachers) for prompt in rows)
    parts = [f"{n} {domain} -> {' + '.join(names)}" for (domain, names), n in count.items()]
    return f"{len(rows)} rows ({', '.join(parts)})"


def _weights(directory: Path) -> str:
    """The files of a model's weights; their headers are read.

    Raises:
        ConfigError: there is none, or one is damaged.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"{directory} has no *.safetensors; save the model again with save_pretrained"
        )
    tensors = 0
    for file in files:
        try:
            with safe_open(str(file), framework="np") as opened:
                tensors += len(opened.keys())
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file}: cannot be read ({error}); fetch it again") from error
    size = sum(file.stat().st_size for file in files)
    return f"{tensors} tensors, {size / 1e6:.1f} MB"
