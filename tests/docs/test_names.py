"""Recipes and keys that the pages name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mopd.config.peers import PEERS
from mopd.config.schema import RunConfig
from mopd.config.section import Section
from tests.helpers.markdown import name_of, pages, prose, spans
from tests.helpers.runs import ROOT

KEY = re.compile(r"[a-z_]+(\.([a-z_0-9]+|<name>|\*))+")
SECTIONS = frozenset(RunConfig.model_fields)
# Files and modules that look like a key.
FILES = re.compile(r"\.(py|md|yaml|yml|json|jsonl|sh|sbatch|txt|html|svg|toml|safetensors|lock)$")


def is_key(words: list[str], section: type[Section] = RunConfig) -> bool:
    """Whether the path leads through the schema; `*` is everything below, a name any name."""
    head, rest = words[0], words[1:]
    if head == "*":
        return not rest
    if head not in section.model_fields:
        return False
    inner = _section(section.model_fields[head].annotation)
    if inner is None or not rest:
        return not rest
    is_mapping = "dict" in str(section.model_fields[head].annotation)
    return is_key(rest[1:] or ["*"], inner) if is_mapping else is_key(rest, inner)


def _section(annotation: object) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _section(inner)) is not None:
            return found
    return None


def named_keys(page: Path) -> set[str]:
    """Spans such as `a.b.c` or `a.b=value` that begin with a section of a recipe."""
    found = set()
    for span in spans(page):
        key = re.split(r"[=:\s]", span)[0].rstrip(".,;")
        if KEY.fullmatch(key) and key.split(".")[0] in SECTIONS and not FILES.search(key):
            found.add(key)
    return found


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_key_is_in_the_schema(page: Path) -> None:
    theirs = {row.key for peer in PEERS.values() for row in peer.rows}
    named = named_keys(page) - (theirs if page.name == "coming_from.md" else set())
    unknown = sorted(key for key in named if not is_key(key.split(".")))
    assert not unknown, f"{name_of(page)}: {unknown}"


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_recipe_is_there(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(r"(?<!\w)recipe=([a-z][\w/]*)(?![\w.<])", text)) - {"mine"}
    named |= set(re.findall(r"`(mopd_[a-z_]+|(?:gpu|npu)/[a-z]\w*)`", prose(page)))
    missing = sorted(n for n in named if not (ROOT / "recipes" / f"{n}.yaml").is_file())
    assert not missing, f"{name_of(page)}: {missing}"


def test_a_wrong_key_is_noticed() -> None:
    right = ("teachers.math.backend.type", "ctkd.hkl.*", "pools.<name>.shared", "cache_dir")
    wrong = ("train.step", "train.steps.more", "pools.x.share", "teachers.x.backend.tpye")
    assert all(is_key(key.split(".")) for key in right)
    assert not any(is_key(key.split(".")) for key in wrong)
