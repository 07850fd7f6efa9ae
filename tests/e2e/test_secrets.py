"""A server's key is used, and is nowhere to be found afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mopd.demo import World
from mopd.tokens.chat import ChatTokenizer
from tests.helpers.runs import launch, words
from tests.helpers.stub_scorers import PrefixScorer
from tests.helpers.stub_server import StubOptions, StubServer

KEY = "canary-7d1f-key-of-the-test"
VARIABLE = "MOPD_TEST_TEACHER_KEY"


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)


def run(world: World, directory: Path, stub: StubServer) -> Any:
    overrides = words(
        world,
        directory,
        "keyed",
        train__steps=2,
        checkpoint__save_interval=2,
        teachers__sort__backend__type="vllm",
        teachers__sort__backend__urls=f"[{stub.url}]",
        teachers__sort__backend__api_key_env=VARIABLE,
        teachers__sort__backend__start_s=5,
    )
    return launch("mopd_ctkd", overrides)


def leaks(directory: Path, *texts: str) -> list[str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert len(files) > 5
    return [
        *(str(path) for path in files if KEY.encode() in path.read_bytes()),
        *(text for text in texts if KEY in text),
    ]


@pytest.mark.e2e
@pytest.mark.parametrize("served", [KEY, f"another-{KEY[:4]}"])
def test_no_file_and_no_line_holds_the_key(
    tiny_world: World, tmp_path: Path, key: None, served: str
) -> None:
    """Also where the server refuses it and repeats it in its answer."""
    size = ChatTokenizer.load(tiny_world.teachers["sort"]).vocabulary.size
    options = StubOptions(key=served, refusal=f"the key {KEY} is wrong")
    with StubServer(PrefixScorer(size), options) as stub:
        done = run(tiny_world, tmp_path, stub)
        if served == KEY:
            assert done.returncode == 0, done.stderr
            assert stub.headers[-1]["authorization"] == f"Bearer {KEY}"
        else:
            assert done.returncode == 2 and "answered 401: " in done.stderr
            assert "***" in done.stderr
    if served == KEY:
        assert leaks(tmp_path / "keyed", done.stdout, done.stderr) == []
        assert VARIABLE in (tmp_path / "keyed" / "config.yaml").read_text()
    else:
        assert KEY not in done.stdout + done.stderr
