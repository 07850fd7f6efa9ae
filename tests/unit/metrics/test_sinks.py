"""Step lines reach files and terminals whole, and a resumed run repeats no step."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mopd.errors import ArtifactError
from mopd.metrics.console import ConsoleSink
from mopd.metrics.sinks import JsonlSink, MultiSink, StepLine, TensorBoardSink

HOSTILE = "[red]x[/red]\x1b[2J"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_is_on_disk_when_log_returns(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log(0, {"loss": 0.5, "kl/math": 0.25})
    assert read(path) == [{"step": 0, "loss": 0.5, "kl/math": 0.25}]
    sink.close()


def test_a_number_that_json_cannot_hold_keeps_its_raw_value(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log(3, {"loss": math.nan, "grad_norm": math.inf, "lr": -math.inf})
    sink.close()
    assert read(path) == [
        {
            "step": 3,
            "loss": None,
            "loss/raw": "nan",
            "grad_norm": None,
            "grad_norm/raw": "inf",
            "lr": None,
            "lr/raw": "-inf",
        }
    ]


def test_a_resumed_run_repeats_no_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlSink(path)
    for step in range(5):
        first.log(step, {"loss": 1.0})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # killed inside the line
    resumed = JsonlSink(path)
    resumed.truncate_from(3)
    resumed.log(3, {"loss": 2.0})
    resumed.close()
    assert [(line["step"], line["loss"]) for line in read(path)] == [(0, 1), (1, 1), (2, 1), (3, 2)]
    assert [child.name for child in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("damage", ["{\n", "3\n", '{"loss": 1}\n', '{"step": "x"}\n'])
def test_a_damaged_line_is_not_thrown_away_silently(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n' + damage)
    sink = JsonlSink(path)
    with pytest.raises(ArtifactError, match="line 2 is not a step line"):
        sink.truncate_from(1)
    sink.close()
    assert path.read_text() == '{"step": 0}\n' + damage


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step in range(4):
        sink.log(step, {"loss": 1.0 + step, "grad_norm": math.nan})
    sink.truncate_from(2)
    sink.log(2, {"loss": 9.0})
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert events.Tags()["tensors"] == []
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (0, 1.0),
        (1, 2.0),
        (2, 9.0),
    ]


def test_tensorboard_groups_keys_and_shows_the_recipe(tmp_path: Path) -> None:
    keys = ("loss", "loss/sort", "accuracy", "accuracy/sort", "canonical", "lr", "skipped")
    sink = TensorBoardSink(tmp_path, config="run:\n  name: <b>x</b>\n")
    sink.log(0, dict.fromkeys((*keys, "phase/train", "tokens_per_second"), 1.0))
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == [
        *keys[:5],
        "step/lr",
        "step/skipped",
        "phase/train",
        "step/tokens_per_second",
    ]
    assert events.SummaryMetadata("config").plugin_data.plugin_name == "text"
    (text,) = events.Tensors("config")[0].tensor_proto.string_val
    assert text.decode() == "    run:\n      name: <b>x</b>", "a block of code in Markdown"


def terminal(*, is_terminal: bool) -> tuple[Console, io.StringIO]:
    screen = io.StringIO()
    return Console(file=screen, force_terminal=is_terminal, width=200), screen


def test_plain_lines_come_every_interval_and_at_the_end() -> None:
    console, screen = terminal(is_terminal=False)
    sink = ConsoleSink(num_steps=5, log_interval=2, console=console)
    line = {"loss": 0.5, "kl/math": 0.25, "accuracy": 0.5, "tokens_per_second": 1234.5}
    for step in range(5):
        sink.log(step, line)
    sink.close()
    lines = screen.getvalue().splitlines()
    assert [text.split(" left ")[0] for text in lines] == [
        f"step {done}/5 loss 0.5000 kl/math 0.2500 accuracy 50.0% tokens/s 1234"
        for done in (2, 4, 5)
    ]


def test_a_terminal_shows_a_panel() -> None:
    console, screen = terminal(is_terminal=True)
    sink = ConsoleSink(num_steps=2, log_interval=1, console=console)
    sink.truncate_from(1)
    sink.log(1, {"loss": 0.5, "kl/math": 0.25})
    sink.log(1, {"eval/accuracy/sums": 0.75})
    sink.note("checkpoint saved")
    sink.close()
    panel = screen.getvalue().rpartition("checkpoint saved")[2]
    for shown in ("2/2", "100%", "0.5000", "math", "0.2500", "sums", "75.0%", "held-out @2"):
        assert shown in panel
    assert screen.getvalue().rindex("\x1b[?25h") > screen.getvalue().rindex("\x1b[?25l")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_name_from_outside_is_shown_as_it_is(is_terminal: bool) -> None:
    console, screen = terminal(is_terminal=is_terminal)
    sink = ConsoleSink(num_steps=1, log_interval=1, console=console)
    sink.log(0, {f"kl/{HOSTILE}": 0.25})
    sink.note(HOSTILE)
    sink.close()
    shown = screen.getvalue()
    assert shown.count("[red]x[/red]\\x1b[2J") >= 2
    assert "\x1b[2J" not in screen.getvalue()


class Recorder:
    def __init__(self, *, fails: bool = False) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.fails = fails

    def log(self, step: int, line: StepLine) -> None:
        self.calls.append((step, dict(line)))

    def truncate_from(self, step: int) -> None:
        self.calls.append((step,))

    def close(self) -> None:
        self.calls.append(())
        if self.fails:
            raise OSError("disk full")


def test_many_sinks_get_everything_and_all_are_closed() -> None:
    recorders = [Recorder(), Recorder(fails=True), Recorder()]
    sink = MultiSink(recorders)
    sink.truncate_from(4)
    sink.log(4, {"loss": 1.0})
    with pytest.raises(OSError, match="disk full"):
        sink.close()
    for recorder in recorders:
        assert recorder.calls == [(4,), (4, {"loss": 1.0}), ()]
