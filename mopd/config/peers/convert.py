"""From another trainer's keys to a recipe, and what became of each of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from mopd.config.check import check_config
from mopd.config.peers import PEERS
from mopd.config.peers.rows import Peer, Row, Source
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError

Kind = Literal["carried", "changed", "dropped", "unknown"]
OPEN = re.compile(r"\$[\w{(`]")  # a variable, an interpolation or a command
ENVIRONMENT = re.compile(r"[A-Z][A-Z0-9_]*")
LAUNCH_NOTE = "says how it is launched, not what is trained; ranks are torchrun's here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What became of one of their keys."""

    kind: Kind
    key: str
    value: Any
    targets: dict[str, Any] = field(default_factory=dict)  # ours -> value
    note: str = ""
    important: bool = False  # the recipe trains something else without it


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """One key of the recipe and where it comes from."""

    value: Any
    origin: str
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """A recipe and its report.

    Attributes:
        writes: dotted key of the recipe -> its value and origin.
        entries: one per key of the file, in its order.
        defaults: their defaults of keys that the file does not set, and what they always do.
        missing: what a run still needs, one line each.
        problem: why the recipe would be refused once that is there; None where it would not.
    """

    peer: Peer
    writes: dict[str, Write]
    entries: list[Entry]
    defaults: list[Entry]
    missing: list[str]
    problem: str | None

    @property
    def is_whole(self) -> bool:
        """Whether nothing important was left behind."""
        return self.problem is None and not any(entry.important for entry in self.entries)

    def recipe(self) -> dict[str, Any]:
        return nested({target: write.value for target, write in self.writes.items()})


def guess(keys: Mapping[str, Any]) -> Peer:
    """The trainer whose keys these are. Raises ConfigError where none or several are."""
    found = {name: peer.marked(list(keys)) for name, peer in PEERS.items()}
    found = {name: marks for name, marks in found.items() if marks}
    if len(found) == 1:
        return PEERS[next(iter(found))]
    names = "|".join(PEERS)
    if not found:
        raise ConfigError(f"--from: no key tells whose configuration this is; give --from {names}")
    shown = " and ".join(f"{marks[0]} of {name}" for name, marks in found.items())
    raise ConfigError(f"--from: the file has {shown}; say whose it is with --from {names}")


def convert(peer: Peer, given: Mapping[str, Any], *, processes: int | None = None) -> Conversion:
    """Carry over what can be, and say of every key what became of it. Reads no file.

    Args:
        processes: data-parallel processes of their launch; None takes them from the file, else 1.
    """
    return _Converter(peer, given, processes=processes).run()


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections in sections."""
    tree: dict[str, Any] = {}
    for target, value in values.items():
        *sections, last = target.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return tree


class _Converter:
    def __init__(self, peer: Peer, given: Mapping[str, Any], *, processes: int | None) -> None:
        self.peer, self.given = peer, given
        readable = {key: value for key, value in given.items() if not _is_open(value)}
        count = processes or _launched(readable)
        self.source = Source(readable, peer.defaults(), processes=count)
        self.writes: dict[str, Write] = {}
        self.entries: list[Entry] = []
        self.defaults: list[Entry] = []
        self.names = self._teachers()

    def run(self) -> Conversion:
        for key, value in self.given.items():
            self.entries.append(self._given(key, value))
        for row in self.peer.ways:
            self._silent(row, row.key, None, f"what {self.peer.title} always does: {row.key}")
        for row in self.peer.rows:
            for key in self._unset(row):
                value = self.source.default(key)
                self._silent(row, key, value, f"{self.peer.title}'s default of {key}")
        config = self._accepted()
        return Conversion(
            peer=self.peer,
            writes=self.writes,
            entries=self.entries,
            defaults=self.defaults,
            missing=list(_missing(config)),
            problem=_problem(config),
        )

    def _teachers(self) -> list[str]:
        try:
            return self.peer.teachers(self.source) or ["teacher"]
        except ValueError:
            return ["teacher"]

    def _given(self, key: str, value: Any) -> Entry:
        rows = self.peer.rows_of(key)
        if not rows:
            return self._strange(key, value)
        if value is None:
            note = "is null, which is as if it were not set"
            return Entry(kind="dropped", key=key, value=None, note=note)
        if _is_open(value):
            note = "is a variable or an interpolation, and nothing is run here; write its value"
            return Entry(kind="dropped", key=key, value=value, note=note, important=True)
        entry = Entry(kind="dropped", key=key, value=value)
        for row in rows:
            if row.when(self.source):
                entry = self._apply(entry, row)
        if not entry.targets and not entry.note:
            entry = replace(entry, note="is not read with the other settings of this file")
        return entry

    def _strange(self, key: str, value: Any) -> Entry:
        if key.startswith("launch.") or ENVIRONMENT.fullmatch(key):
            return Entry(kind="dropped", key=key, value=value, note=LAUNCH_NOTE)
        note = f"is no key of {self.peer.title} that is known here; see whether it matters"
        return Entry(kind="unknown", key=key, value=value, note=note, important=True)

    def _apply(self, entry: Entry, row: Row) -> Entry:
        """The entry with what this row makes of its value."""
        lost = row.lost(entry.value)
        if row.target is None:
            return _noted(entry, row.note, important=lost)
        try:
            values = self._values(row, entry.key, entry.value)
        except ValueError as error:
            return _noted(entry, f"cannot be carried over: {error}", important=True)
        origin = f"{self.peer.title}: {entry.key}"
        for target, value in values.items():
            before = self.writes.get(target)
            if before is not None and before.value != value:
                note = f"{target} is set by {before.origin} already, to another value"
                return _noted(entry, note, important=True)
            self.writes[target] = Write(value=value, origin=origin, note=row.note)
        targets = {**entry.targets, **values}
        kind: Kind = "changed" if row.note or entry.kind == "changed" else "carried"
        return _noted(replace(entry, kind=kind, targets=targets), row.note, important=lost)

    def _values(self, row: Row, key: str, value: Any) -> dict[str, Any]:
        assert row.target is not None
        made = row.to(value, self.source)
        if row.target == "*":
            assert isinstance(made, dict)
            return {self._named(target, key): value for target, value in made.items()}
        return {self._named(row.target, key): made}

    def _named(self, target: str, key: str) -> str:
        """`{teacher}` is the one of the key's position, `{0}` the first."""
        match = re.search(r"\.(\d+)(\.|$)", key)
        place = int(match[1]) if match else 0
        target = re.sub(r"\{(\d+)\}", lambda m: self.names[int(m[1])], target)
        return target.replace("{teacher}", self.names[min(place, len(self.names) - 1)])

    def _unset(self, row: Row) -> Iterator[str]:
        """The keys of a row with a default that the file leaves to it."""
        if row.key not in self.peer.defaults():
            return
        name, star, rest = row.key.partition(".*.")
        keys = [f"{name}.{i}.{rest}" for i in self.source.indices(name)] if star else [row.key]
        yield from (key for key in keys if not self.source.has(key) and not self._open(key))

    def _open(self, key: str) -> bool:
        return _is_open(self.given.get(key))

    def _silent(self, row: Row, key: str, value: Any, origin: str) -> None:
        """Write what holds without a key; nothing that the file says is changed by it."""
        if not row.when(self.source) or (value is None and row.key in self.peer.defaults()):
            return
        if row.target is None:
            if row.lost(value):
                self.defaults.append(Entry(kind="dropped", key=key, value=value, note=row.note))
            return
        try:
            values = self._values(row, key, value)
        except ValueError:
            return  # the key that it goes by has an entry of its own
        values = {target: v for target, v in values.items() if target not in self.writes}
        for target, made in values.items():
            self.writes[target] = Write(value=made, origin=origin, note=row.note)
        if values:
            kind: Kind = "changed" if row.note else "carried"
            self.defaults.append(
                Entry(kind=kind, key=key, value=value, targets=values, note=row.note)
            )

    def _accepted(self) -> RunConfig:
        """The recipe as the schema takes it; values that it refuses are taken out and told."""
        while True:
            values = nested({target: write.value for target, write in self.writes.items()})
            try:
                return RunConfig.model_validate(values)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            refused = [t for t in self.writes if f"{place}.".startswith(f"{t}.")]
            refused = refused or [t for t in self.writes if t.startswith(f"{place}.")]
            assert refused, f"{place}: {first['msg']}"
            self._refuse(refused, first["msg"])

    def _refuse(self, targets: list[str], why: str) -> None:
        for target in targets:
            del self.writes[target]
        note = f"cannot be carried over: {', '.join(targets)}: {why}"
        for place, entry in enumerate(self.entries):
            if any(target in entry.targets for target in targets):
                left = {k: v for k, v in entry.targets.items() if k not in targets}
                kind: Kind = entry.kind if left else "dropped"
                entry = replace(entry, kind=kind, targets=left)
                self.entries[place] = _noted(entry, note, important=True)
        self.defaults = [e for e in self.defaults if not set(targets) & set(e.targets)]


def _noted(entry: Entry, note: str, *, important: bool) -> Entry:
    note = "; ".join(part for part in (entry.note, note) if part)
    return replace(entry, note=note, important=entry.important or important)


def _is_open(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(item, str) and OPEN.search(item) is not None for item in values)


def _launched(given: Mapping[str, Any]) -> int:
    """Processes that a script starts: torchrun's, accelerate's or ms-swift's, on its nodes."""
    count = 1
    for keys in (
        ("launch.nproc_per_node", "launch.num_processes", "NPROC_PER_NODE"),
        ("launch.nnodes", "NNODES"),
    ):
        for key in keys:
            if re.fullmatch(r"[1-9]\d{0,4}", str(given.get(key, ""))):
                count *= int(given[key])
                break
    return count


def _missing(config: RunConfig) -> Iterator[str]:
    """What nobody but the user has: directories and files on this machine."""
    models = {"student.model": config.student.model}
    for name, teacher in config.teachers.items():
        if teacher.backend.type != "self":
            models[f"teachers.{name}.model"] = teacher.model
    for key, model in models.items():
        if model is None:
            yield f"{key}: set a directory with the model (a served teacher needs its tokenizer)"
        elif not Path(model).is_dir():
            yield f"{key}: {model} is no directory here; download the model and give its directory"
    if not config.teachers:
        yield "teachers: name one, as in teachers.math.model=<dir>"
    if config.data.path is None:
        yield "data.path: set rows with prompts, a local file or pattern"
    elif not Path(config.data.path).exists():
        yield f"data.path: {config.data.path} is no file here; give a local one"
    if "steps" not in config.train.model_fields_set:
        yield f"train.steps: is {config.train.steps} until you set it; epochs are not counted"


def _problem(config: RunConfig) -> str | None:
    """What the checks of a run refuse, paths aside."""
    parallel = config.student.parallel
    world_size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    world_size *= parallel.context_parallel_size
    if not config.teachers:
        return None  # told as missing
    student = config.student.model_copy(update={"model": None})
    try:
        check_config(
            config.model_copy(update={"student": student}), world_size=world_size, files=False
        )
    except ConfigError as error:
        return str(error)
    return None
