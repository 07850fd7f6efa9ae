"""What the documentation's Markdown says: fences, links, headings, code spans."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from tests.helpers.runs import ROOT

FENCE = re.compile(r"^(?P<ticks>```+)\s*(?P<info>\S*)(?P<words>[^`]*)$")
REMARK = re.compile(r"^<!--\s*(?P<what>not run|exit code|file)\s*:\s*(?P<text>.*?)\s*-->$")
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
IMAGE = re.compile(r"!\[[^\]]*\]\((?P<target>[^)\s]+)\)")
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True, kw_only=True)
class Fence:
    """One fenced block. ``remarks`` are those of the lines directly before it.

    ``not run: why`` excuses commands, ``exit code: n`` is what the last one must end with, and
    ``file: name`` is what a block that is no command is saved as before the next one runs.
    ``output`` is the ``text`` block that follows with nothing but blank lines between.
    """

    page: str
    line: int
    info: str
    text: str
    remarks: dict[str, str]
    output: str | None = None

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """README.md and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read_fences(page: Path) -> list[Fence]:
    """The blocks of a page in order; a block that never ends is an error of its own."""
    found = list(_fences(page))
    lines = page.read_text().splitlines()
    out = []
    for fence, following in zip_longest(found, found[1:]):
        last = fence.line + len(fence.text.splitlines()) + 1
        near = following is not None and not "".join(lines[last : following.line - 1]).strip()
        shown = following.text if near and following.info == "text" else None
        out.append(replace(fence, output=shown))
    return out


def _fences(page: Path) -> Iterator[Fence]:
    opened: tuple[str, str, int] | None = None
    remarks: dict[str, str] = {}
    held: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        mark = FENCE.match(line)
        if opened is not None:
            if mark and mark["ticks"] == opened[0] and not mark["info"]:
                yield Fence(
                    page=name_of(page),
                    line=opened[2],
                    info=opened[1],
                    text="\n".join(held) + "\n",
                    remarks=remarks,
                )
                opened, remarks, held = None, {}, []
            else:
                held.append(line)
        elif mark:
            opened = (mark["ticks"], mark["info"], number)
        elif remark := REMARK.match(line):
            remarks[remark["what"]] = remark["text"]
        else:
            remarks = {}
    assert opened is None, f"{name_of(page)}:{opened[2]}: this block never ends"


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    kept, inside = [], False
    for line in page.read_text().splitlines():
        if FENCE.match(line) or (inside and line.startswith("```")):
            inside = not inside
        elif not inside:
            kept.append(line)
    return "\n".join(kept) + "\n"


def links(page: Path) -> list[str]:
    text = prose(page)
    return [m["target"] for m in [*LINK.finditer(text), *IMAGE.finditer(text)]]


def spans(page: Path) -> list[str]:
    """Inline code of the prose."""
    return SPAN.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub, and Sphinx with myst_heading_anchors, give the headings."""
    found: set[str] = set()
    for line in prose(page).splitlines():
        if heading := re.match(r"#{1,6}\s+(.*)", line):
            text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).strip().lower()
            found.add(re.sub(r"[^\w\- ]", "", text).replace(" ", "-"))
    return found
