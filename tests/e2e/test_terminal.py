"""A real run on a real terminal: the panel is drawn, and an interrupt leaves all in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mopd.demo import World
from tests.helpers.runs import ROOT, command, environment, launch, words
from tests.helpers.terminal import Terminal


def on_a_terminal(world: World, directory: Path, *, columns: int, **variables: str) -> Terminal:
    overrides = words(
        world,
        directory,
        "shown",
        train__steps=400,
        evaluate__max_prompts_per_domain=2,
        logging__log_interval=1,
    )
    return Terminal(
        command("mopd_ctkd", overrides),
        cwd=ROOT,
        env={**environment(), "TERM": "xterm-256color", "LANG": "C.UTF-8", **variables},
        columns=columns,
        rows=40,
    )


@pytest.mark.e2e
def test_an_interrupted_panel_leaves_the_terminal_in_order(
    tiny_world: World, tmp_path: Path
) -> None:
    with on_a_terminal(tiny_world, tmp_path, columns=100) as terminal:
        assert terminal.read_until("█ rollout", timeout=120.0), terminal.text
        terminal.type(b"\x03")
        assert terminal.wait(timeout=60.0) == 130
        assert terminal.is_restored
    assert "╭─ shown ─" in terminal.text
    assert re.search(r" a step \d", terminal.text)
    assert "measuring the student and its teachers on the held-out prompts" in terminal.text
    end = terminal.text.rstrip().splitlines()
    assert end[-1] == "interrupted: the same command continues from the last checkpoint"
    assert end[-2].startswith("╰"), "the panel stands whole above what is said last"


@pytest.mark.e2e
@pytest.mark.parametrize(("columns", "term"), [(100, "dumb"), (40, "xterm-256color")])
def test_where_no_panel_fits_there_are_lines(
    tiny_world: World, tmp_path: Path, columns: int, term: str
) -> None:
    with on_a_terminal(tiny_world, tmp_path, columns=columns, TERM=term) as terminal:
        assert terminal.read_until("step 2/400 loss ", timeout=120.0), terminal.text
        terminal.type(b"\x03")
        assert terminal.wait(timeout=60.0) == 130
    assert "╭" not in terminal.text
    assert "\x1b[?25l" not in terminal.output


@pytest.mark.e2e
def test_a_pipe_gets_plain_lines(
    tiny_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a variable asks for colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = launch("mopd_ctkd", words(tiny_world, tmp_path, "piped", logging__log_interval=2))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert [line.split(" loss ")[0] for line in lines] == ["step 2/4", "step 4/4"]
    assert " kl/sort " in lines[0] and " tokens/s " in lines[0] and " left 0:" in lines[0]
    assert "╭─ piped" not in done.stdout
    assert "\x1b[?25l" not in done.stdout
