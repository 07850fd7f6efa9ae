"""docs/cli.md and the parsers say the same; help needs none of the heavy libraries."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from mopd.cli.main import VERBS, main
from mopd.cli.reference import BLOCK, filled, parser_of
from tests.helpers.runs import ROOT

PAGE = ROOT / "docs" / "cli.md"
HERE = [verb for verb in VERBS if importlib.util.find_spec(f"mopd.cli.{verb}")]


def test_the_page_has_every_verb_and_its_words() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert sorted(match["verb"] for match in BLOCK.finditer(page)) == sorted(VERBS)
    assert page == filled(page), "run `python -m mopd.cli.reference docs/cli.md`"
    for verb in VERBS:
        assert f"\n## {verb}\n" in page


def test_a_word_that_the_page_lacks_is_noticed() -> None:
    page = PAGE.read_text(encoding="utf-8")
    without = "\n".join(line for line in page.splitlines() if "`--live`" not in line)
    assert "`--live`" in page and filled(without) != without


@pytest.mark.parametrize("verb", HERE)
def test_a_verb_that_prints_has_json(verb: str) -> None:
    parser = parser_of(verb)
    assert parser is not None and parser.prog == f"mopd {verb}" and parser.description
    below = [action.choices for action in parser._actions if action.dest == "verb"]
    parsers = list((below[0] or {}).values()) if below else [parser]  # type: ignore[union-attr]
    for one in parsers:
        names = {name for action in one._actions for name in action.option_strings}
        assert "--json" in names or verb in ("serve", "completion", "report", "compare"), one.prog


def loaded_by(*commands: list[str]) -> set[str]:
    """Top-level modules that these commands bring in, one after the other in one process."""
    probe = (
        "import io, json, sys\nfrom contextlib import redirect_stdout\n"
        "from mopd.cli.main import main\n"
        f"for words in {list(commands)!r}:\n"
        "    with redirect_stdout(io.StringIO()):\n"
        "        try:\n            main(words)\n"
        "        except SystemExit as ended:\n            assert not ended.code, words\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return set(json.loads(done.stdout))


def test_help_brings_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "pydantic", "omegaconf", "numpy", "rich", "argcomplete"}
    assert not heavy & loaded_by(["--help"], ["--version"])


def test_the_help_of_no_verb_brings_torch() -> None:
    commands = [[verb, "--help"] for verb in HERE]
    assert not {"torch", "transformers", "megatron"} & loaded_by(*commands)


@pytest.mark.parametrize("verb", HERE)
def test_an_unknown_option_is_exit_code_2(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([verb, "--no-such-option"])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err
