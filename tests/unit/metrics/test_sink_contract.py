"""What holds for every sink, whatever a run does with it."""

from __future__ import annotations

import io
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from mopd.metrics.console import ConsoleSink
from mopd.metrics.sinks import JsonlSink, Sink, TensorBoardSink
from mopd.metrics.wandb_sink import WandbSink
from tests.helpers.runs import ROOT
from tests.helpers.terminal import Terminal

LINE = {"loss": 0.5, "kl/[red]x": 0.25, "accuracy/a": 1.0, "phase/train": 0.1, "time/step": 0.1}


def console(*, is_terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=100, height=30)


MAKERS: dict[str, Callable[[Path], Sink]] = {
    "jsonl": lambda path: JsonlSink(path / "metrics.jsonl"),
    "tensorboard": lambda path: TensorBoardSink(path / "tensorboard", config="a: 1\n"),
    "wandb": lambda path: WandbSink(path, project="p", name="n", config={}, say=print),
    "lines": lambda path: ConsoleSink(
        num_steps=9, log_interval=1, console=console(is_terminal=False)
    ),
    "panel": lambda path: ConsoleSink(
        num_steps=9, log_interval=1, console=console(is_terminal=True)
    ),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_every_sink_takes_what_a_run_gives(
    maker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    streams = sys.stdout, sys.stderr
    for start in (0, 2):  # the second is a run that continues
        sink = MAKERS[maker](tmp_path)
        sink.note("before the first step \x1b[2J")
        sink.truncate_from(start)
        for step in range(start, start + 3):
            sink.log(step, LINE)
        sink.log(start + 2, {"eval/accuracy/a": 0.5})
        sink.log(start + 3, {"loss": math.nan, "grad_norm": math.inf, "kl/y": -math.inf})
        sink.log(start + 4, {})
        sink.note("warning: late news")
        sink.close()
        sink.close()
    assert (sys.stdout, sys.stderr) == streams


def test_prints_and_logs_beside_a_panel_go_above_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Also those of a logger that kept the stream of before."""
    stream = io.StringIO()
    sys.stderr, before = stream, sys.stderr
    logger, handler = logging.getLogger("beside the panel"), logging.StreamHandler()
    logger.addHandler(handler)
    shown = console(is_terminal=True)
    sink = ConsoleSink(num_steps=9, log_interval=1, console=shown)
    try:
        sink.truncate_from(0)
        sink.log(0, LINE)
        print("a print")
        logger.warning("a logger")
        sink.close()
        logger.warning("afterwards")
    finally:
        logger.removeHandler(handler)
        sys.stderr = before
    assert isinstance(shown.file, io.StringIO)
    drawn = shown.file.getvalue()
    assert "a print\n" in drawn and "a logger\n" in drawn
    assert drawn.rindex("a logger") < drawn.rindex("╭")
    assert stream.getvalue() == "afterwards\n", "and it has its own stream back"
    assert capsys.readouterr().out == ""


def test_an_evaluation_is_shown_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("mopd.metrics.console.time.monotonic", lambda: now)
    lines, panel = console(is_terminal=False), console(is_terminal=True)
    plain = ConsoleSink(num_steps=9, log_interval=1, console=lines)
    for now in (1.0, 4.0, 6.0, 7.0, 12.0):
        plain.activity("answering", int(now), 20, "prompts")
    assert isinstance(lines.file, io.StringIO)
    assert lines.file.getvalue() == "answering: 6/20 prompts\nanswering: 12/20 prompts\n"
    live = ConsoleSink(num_steps=9, log_interval=1, console=panel)
    live.activity("answering", 6, 20, "prompts")
    live.close()
    assert isinstance(panel.file, io.StringIO)
    assert "answering: 6/20 prompts" in panel.file.getvalue()


KILLED = """
import time
from mopd.metrics.console import ConsoleSink
sink = ConsoleSink(num_steps=9, log_interval=1, title="killed")
sink.truncate_from(0)
sink.log(0, {"loss": 0.5})
time.sleep(60)
"""


def test_a_process_that_is_killed_leaves_the_terminal_in_order() -> None:
    words = [sys.executable, "-c", KILLED]
    env = {**os.environ, "TERM": "xterm-256color"}
    with Terminal(words, cwd=ROOT, env=env, columns=80, rows=30) as terminal:
        assert terminal.read_until("loss 0.5000", timeout=60.0), terminal.text
        terminal.process.kill()
        terminal.wait(timeout=10.0)
        assert terminal.is_restored
