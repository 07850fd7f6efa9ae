"""Where step lines go. A step line is a flat mapping; docs/metrics.md names its keys."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from mopd.errors import ArtifactError
from mopd.metrics.text import json_line, replace_file

StepLine = Mapping[str, float]


class Sink(Protocol):
    """A reader of step lines. Sinks live on one rank; the caller decides which."""

    def log(self, step: int, line: StepLine) -> None:
        """Record one step. Steps rise, except after `truncate_from`."""
        ...

    def note(self, message: str) -> None:
        """Pass on one line of news (a warning) to a person; files have no use for it."""
        ...

    def truncate_from(self, step: int) -> None:
        """Forget every step >= `step`: a resumed run is about to write them again."""
        ...

    def close(self) -> None: ...


class MultiSink:
    """Hands every line to all of its sinks."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = tuple(sinks)

    def log(self, step: int, line: StepLine) -> None:
        for sink in self._sinks:
            sink.log(step, line)

    def note(self, message: str) -> None:
        for sink in self._sinks:
            sink.note(message)

    def truncate_from(self, step: int) -> None:
        for sink in self._sinks:
            sink.truncate_from(step)

    def close(self) -> None:
        """Close all, also when one of them fails."""
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)


class JsonlSink:
    """One JSON object a line, flushed at once, so that a killed run loses at most a torn line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_tail(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, line: StepLine) -> None:
        self._file.write(json_line({"step": step, **line}) + "\n")
        self._file.flush()

    def note(self, message: str) -> None:
        del message

    def truncate_from(self, step: int) -> None:
        """Drop lines with `step` >= the given one; a line that is not JSON is an ArtifactError."""
        self._file.close()
        kept: list[str] = []
        for number, text in enumerate(self._path.read_text("utf-8").splitlines(True), start=1):
            if _step_of(text, self._path, number) < step:
                kept.append(text)
        replace_file(self._path, "".join(kept))
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()


def _drop_torn_tail(path: Path) -> None:
    """Cut what follows the last line break: the writer was killed inside that line."""
    if not path.exists():
        return
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)


def _step_of(text: str, path: Path, number: int) -> int:
    try:
        step = json.loads(text)["step"]
    except (ValueError, KeyError, TypeError) as error:
        step, cause = None, error
    else:
        cause = None
    if not isinstance(step, int):
        raise ArtifactError(
            f"{path} line {number} is not a step line: move the file away, or start afresh with "
            "run.overwrite=true"
        ) from cause
    return step


class TensorBoardSink:
    """Scalars for TensorBoard, and the recipe as a text. Writes the event file directly, without
    torch's writer.

    A tag is the key of a line. TensorBoard makes a group of what is before the first slash; keys
    without one that head no family of their own stand together, as ``step/<key>``.

    Args:
        config: YAML of the resolved recipe, for the tab of texts.
    """

    def __init__(self, directory: Path, *, config: str = "") -> None:
        # Imported here: these bring protobuf in, which no other sink needs.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # protobuf makes its classes at run time, where no type checker sees them.
        events: Any = event_pb2
        summaries: Any = summary_pb2
        self._event, self._session_log = events.Event, events.SessionLog
        self._summary = summaries.Summary
        self._writer = EventFileWriter(str(directory))
        if config:
            self._write_text("config", config)

    def _write_text(self, tag: str, text: str) -> None:
        """Shown as it is: TensorBoard reads Markdown, where four spaces make a block of code."""
        # Imported here, as above.
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        block = "\n".join(f"    {line}" for line in text.splitlines())
        value = self._summary.Value(
            tag=tag,
            metadata=create_summary_metadata(display_name=None, description=None),
            tensor=make_tensor_proto(block.encode()),
        )
        summary = self._summary(value=[value])
        self._writer.add_event(self._event(wall_time=time.time(), step=0, summary=summary))

    def log(self, step: int, line: StepLine) -> None:
        """Write all numbers; NaN and infinities are left out (the JSON lines have them)."""
        numbers = {key: float(value) for key, value in line.items() if key != "step"}
        scalars = [
            self._summary.Value(tag=_tag(key), simple_value=value)
            for key, value in numbers.items()
            if math.isfinite(value)
        ]
        summary = self._summary(value=scalars)
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def note(self, message: str) -> None:
        del message

    def truncate_from(self, step: int) -> None:
        """Tell TensorBoard that the run restarted: it hides older events from `step` on."""
        restart = self._session_log(status=self._session_log.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=step, session_log=restart))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


_HEADS = ("loss", "accuracy", "canonical")  # of families: the mean stands beside its parts


def _tag(key: str) -> str:
    return key if "/" in key or key in _HEADS else f"step/{key}"
