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
SHORT = 6  # letters; what stands before a cut is longer


def quotes() -> list[str]:
    fences = [fence for fence in read_fences(PAGE) if fence.info == "text"]
    return [line for fence in fences for line in fence.text.splitlines() if line.strip()]


@functools.cache
def literals() -> tuple[str, ...]:
    """Every string of the program that has a space in it, holes marked."""
    return tuple(
        found.replace("\n", " ")
        for folder in ("mopd", "launch")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for found in _strings(path)
        if " " in found
    )


def _strings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else HOLE for p in node.values)
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def is_said(quote: str) -> bool:
    """Whether one string of the program reads like this; `...` stands for anything."""
    # a name that ends, or begins, with a dot: `teachers....: `, `....eos_token=`
    parts = [re.escape(part) for part in re.split(r"\.{3,4}", quote.strip(" .;:"))]
    pattern = re.compile(".*".join(parts))
    return any(pattern.search(one) for one in literals())


def is_composed(quote: str) -> bool:
    """The same for a line that is put together of several strings, at a `: ` or `; `."""
    if is_said(quote):
        return True
    cuts = [m for m in re.finditer(r"[:;] ", quote) if m.start() >= SHORT]
    return any(is_said(quote[: m.start()]) and is_composed(quote[m.end() :]) for m in cuts)


@pytest.mark.parametrize("quote", quotes())
def test_a_quoted_message_is_in_the_source(quote: str) -> None:
    said = re.sub(r"^(error|warning): (step \.\.\.: )?", "", quote)
    assert len(said.replace(".", "")) >= 15, "quotes too little to be found"
    assert is_composed(said)


def test_there_are_enough_symptoms_and_each_has_a_remedy() -> None:
    sections = re.split(r"^### ", PAGE.read_text(), flags=re.M)[1:]
    assert len(sections) >= 25
    for section in sections:
        text = re.sub(r"```.*?```", "", section, flags=re.S).splitlines()[1:]
        assert len(" ".join(text).split()) >= 10, section.splitlines()[0]


def test_another_word_is_noticed() -> None:
    assert is_composed("... holds a run with other settings (...); choose another run.name")
    assert not is_composed("... holds a run with other settings (...); choose another run.names")
    assert is_composed("recipe `...` does not exist; recipes: ...")
    assert not is_composed("recipe `...` is not there; recipes: ...")
