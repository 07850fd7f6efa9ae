"""Links between the pages lead somewhere, on GitHub and on the site."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.markdown import anchors, links, name_of, pages
from tests.helpers.runs import ROOT


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_links_and_anchors_exist(page: Path) -> None:
    wrong = [target for target in links(page) if not leads_somewhere(page, target)]
    assert not wrong, f"{name_of(page)}: {wrong}"


def leads_somewhere(page: Path, target: str) -> bool:
    if target.startswith(("https://", "http://", "mailto:")):
        return True  # no network in tests
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve() if name else page
    if not path.is_file() or ROOT not in path.parents:
        return False
    return not anchor or (path.suffix == ".md" and anchor in anchors(path))


def test_a_wrong_link_is_noticed() -> None:
    page = ROOT / "docs" / "recipes.md"
    assert leads_somewhere(page, "losses.md#gold")
    assert not leads_somewhere(page, "losses.md#golden")
    assert not leads_somewhere(page, "loss.md")
