"""What docs/troubleshooting.md quotes is what the program says."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.markdown import read_fences
from tests.helpers.runs import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
HOLE = "\x00"  # of an f-string
SHORT = 6  # letters; what is left between two holes may be less


def quotes() -> list[str]:
    fences = [fence for fence in read_fences(PAGE) if fence.info == "text"]
    return [line for fence in fences for line in fence.text.splitlines() if line.strip()]


@functools.cache
def literals() -> str:
    """Every string of the program, holes marked, one a line."""
    return "\n".join(
        found.replace("\n", " ")
        for folder in ("mopd", "launch")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for found in _strings(path)
    )


def _strings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else HOLE for p in node.values)
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def fragments(quote: str) -> list[str]:
    """What stands between the `...`, and between the parts that a line is composed of.

    Without the prefix that every line has, and what is too short to say anything.
    """
    said = re.sub(r"^(error|warning): (step \.\.\.: )?", "", quote)
    parts = [part.strip(" .,:;()=`?") for part in re.split(r"\.\.\.|; |: ", said)]
    return [part for part in parts if len(part) >= SHORT]


@pytest.mark.parametrize("quote", quotes())
def test_a_quoted_message_is_in_the_source(quote: str) -> None:
    parts = fragments(quote)
    assert sum(map(len, parts)) >= 15, "quotes too little to be found"
    missing = [part for part in parts if part not in literals()]
    assert not missing


def test_there_are_enough_symptoms_and_each_has_a_remedy() -> None:
    sections = re.split(r"^### ", PAGE.read_text(), flags=re.M)[1:]
    assert len(sections) >= 25
    for section in sections:
        text = re.sub(r"```.*?```", "", section, flags=re.S).splitlines()[1:]
        assert len(" ".join(text).split()) >= 10, section.splitlines()[0]


def test_another_word_is_noticed() -> None:
    assert "choose another run.name" in literals()
    assert "choose another run.names" not in literals()
