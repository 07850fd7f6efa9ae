"""What an actor prints is kept until it is asked for: whole lines, once, of both streams."""

from __future__ import annotations

import faulthandler
import io
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from mopd.errors import ConfigError
from mopd.runtime.ray import relay
from mopd.runtime.ray.rank import enter
from mopd.runtime.ray.relay import MAX_CHARACTERS, MAX_LINES, Printed


def begin(monkeypatch: pytest.MonkeyPatch) -> Printed:
    """Streams of their own below, which a real actor's are Ray's log files."""
    # in the test itself: pytest has other streams of its own while it makes fixtures
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    return Printed()


def texts(found: list[relay.Line]) -> list[str]:
    return [text for _, text in found]


def test_lines_are_split_and_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = begin(monkeypatch)
    print("one\ntwo")
    sys.stdout.write("thr")
    assert printed.take() == [(False, "one"), (False, "two")]
    sys.stdout.write("ee\n\nfour")
    assert printed.take() == [(False, "three"), (False, "")]
    assert printed.take() == []


def test_both_streams_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = begin(monkeypatch)
    print("a")
    print("b", file=sys.stderr)
    print("c")
    assert printed.take() == [(False, "a"), (True, "b"), (False, "c")]


def test_the_streams_beneath_have_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    Printed()
    print("a", end="", flush=True)
    print("b", file=sys.stderr)
    assert (out.getvalue(), err.getvalue()) == ("a", "b\n")


def test_the_oldest_lines_go(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = begin(monkeypatch)
    for number in range(MAX_LINES + 3):
        print(number)
    found = texts(printed.take())
    assert (found[0], found[-1], len(found)) == ("3", str(MAX_LINES + 2), MAX_LINES)


def test_a_bar_of_progress_is_what_a_terminal_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = begin(monkeypatch)
    for percent in range(101):
        sys.stderr.write(f"\rloading {percent} %")
    sys.stderr.write("\nread\r\n")
    assert printed.take() == [(True, "loading 100 %"), (True, "read")]


def test_a_bar_does_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """No end of line for hours: only what it shows now is kept."""
    printed = begin(monkeypatch)
    for number in range(1000):
        sys.stderr.write(f"\r{number:9d}")
    assert isinstance(sys.stderr, relay.Relay)
    assert len(sys.stderr._rest) < 20
    sys.stderr.write("x" * (MAX_CHARACTERS + 1))  # nor does a line without an end
    assert len(sys.stderr._rest) == 0
    assert len(texts(printed.take())[0]) > MAX_CHARACTERS


def test_a_line_end_of_windows_in_two_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = begin(monkeypatch)
    sys.stdout.write("abc\r")
    sys.stdout.write("\n")
    assert texts(printed.take()) == ["abc"]


def test_rich_prints_without_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = begin(monkeypatch)
    Console(width=40).print("[bold]step[/bold] 1")
    assert printed.take() == [(False, "step 1")]


def test_faulthandler_writes_past_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "err").open("w") as err:
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        monkeypatch.setattr(sys, "stderr", err)
        Printed()
        faulthandler.dump_traceback(file=sys.stderr)
    assert "test_faulthandler_writes_past_it" in (tmp_path / "err").read_text()


class _Slow(str):
    """Lets another thread go on while it is put behind what was there."""

    def __radd__(self, other: str) -> str:
        time.sleep(0.001)
        return f"{other}{self}"


def test_threads_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines mix as they do in a terminal, one has no end yet, and nothing is missing."""
    printed = begin(monkeypatch)

    def write(name: str) -> None:
        for _ in range(20):
            sys.stdout.write(_Slow(name))

    threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print()
    assert Counter("".join(texts(printed.take()))) == {"a": 20, "b": 20}


def test_a_folder_that_a_node_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # and back
    enter(str(tmp_path))
    with pytest.raises(ConfigError, match=r"launcher: .*/none is not on every node"):
        enter(str(tmp_path / "none"))
