"""Long silences are explained, short ones are not."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from mopd.metrics import announced as module
from mopd.metrics.announced import announced


def test_a_long_block_is_announced_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    # a clock that stands still, as a busy machine's does not
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 7.0))
    said: list[str] = []
    heard = threading.Event()

    def say(message: str) -> None:
        said.append(message)
        heard.set()

    with announced("loading\x1b", after_s=0.01, say=say):
        assert heard.wait(10.0)
    assert said[0] == "loading\\x1b: 0 s so far"
    assert said[-1] == "loading\\x1b: done after 0 s"


def test_a_short_block_is_silent() -> None:
    said: list[str] = []
    with announced("loading", after_s=60.0, say=said.append):
        pass
    assert said == []


def test_a_block_that_fails_is_not_called_done() -> None:
    said: list[str] = []
    heard = threading.Event()

    def say(message: str) -> None:
        said.append(message)
        heard.set()

    with pytest.raises(KeyError), announced("loading", after_s=0.01, say=say):
        heard.wait(10.0)
        raise KeyError
    assert said and not any("done" in message for message in said)
    assert "announced" not in {thread.name for thread in threading.enumerate()}


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    said: list[str] = []
    with announced("loading", after_s=0.0, say=said.append):
        threading.Event().wait(0.05)
    assert said == []
