"""`mopd recipe`: the report, exit codes, and the documents beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mopd.cli.main import main
from mopd.config.load import load_config
from mopd.config.peers import PEERS
from mopd.config.peers.table import key_table
from tests.helpers.peers import EXAMPLE

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("name", PEERS)
def test_an_example_is_imported(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "sub" / "r.yaml"
    assert main(["recipe", "import", str(EXAMPLE[name]), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert str(output) in printed
    assert "still to set:" in printed
    load_config(output)
    assert f"# {PEERS[name].title}" in output.read_text()


def test_what_is_lost_gives_one_and_a_recipe_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "f.yaml", tmp_path / "r.yaml"
    source.write_text('use_uld_loss: true\ntop_p: 0.5\n"new\\nkey": 1\n')
    words = ["recipe", "import", str(source), "--output", str(output), "--json"]
    assert main(words) == 1
    report = json.loads(capsys.readouterr().out)
    assert {key["key"] for key in report["keys"] if key["important"]} == {"top_p", "new\nkey"}
    assert report["from"] == "trl"
    assert not report["whole"]
    load_config(output)
    assert main([*words[:-1], "--overwrite"]) == 1
    printed = capsys.readouterr().out
    assert "! new\\nkey = 1" in printed
    assert "2 of 3 keys matter" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.yaml"], "cannot be read"),
        (["f.yaml", "--output", "r.txt"], "ends in .yaml"),
        (["f.yaml", "--output", "f.yaml"], "exists; give another name"),
        (["f.yaml", "--processes", "0"], "at least 1"),
        (["g.yaml"], "no key tells"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f.yaml").write_text("use_uld_loss: true")
    Path("g.yaml").write_text("learning_rate: 1")
    assert main(["recipe", "import", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", PEERS)
def test_the_documents_have_the_tables(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "keys", "--from", name]) == 0
    table = capsys.readouterr().out
    assert table == key_table(PEERS[name])
    assert table in (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
