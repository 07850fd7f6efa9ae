"""The directive `{keys}`: every key of a recipe, from the source of its schema.

A section is a class of `mopd/config`; a key's type and default are those of its field, and what is
said about it is the comment on or above its lines.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

CONFIG = Path(__file__).resolve().parents[1] / "mopd" / "config"
FILES = ("schema.py", "backends.py", "cluster.py")
NUMBERS = {  # of section.py
    "PositiveInt": "int >= 1",
    "NonNegativeInt": "int >= 0",
    "PositiveFloat": "float > 0",
    "NonNegativeFloat": "float >= 0",
    "Probability": "float from 0 to 1",
}


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key; ``name`` is its path with `<name>` for keys of mappings."""

    name: str
    type: str
    default: str
    comment: str


@dataclass(frozen=True, kw_only=True)
class _Section:
    summary: str
    bases: tuple[str, ...]
    fields: tuple[Key, ...]


def sections() -> dict[str, _Section]:
    """Every section class by name."""
    return {name: section for file in FILES for name, section in _read(CONFIG / file)}


def _read(path: Path) -> Iterator[tuple[str, _Section]]:
    source = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [t for t in tokens if t.type == tokenize.COMMENT]
    beside = {t.start[0]: t.string.lstrip("# ") for t in comments}
    alone = {t.start[0] for t in comments if t.line.lstrip().startswith("#")}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        stated = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        yield (
            node.name,
            _Section(
                summary=(ast.get_docstring(node) or "").split("\n\n")[0],
                bases=tuple(base.id for base in node.bases if isinstance(base, ast.Name)),
                fields=tuple(_key(field, beside, alone) for field in stated),
            ),
        )


def _key(field: ast.AnnAssign, notes: dict[int, str], alone: set[int]) -> Key:
    lines = range(field.lineno, (field.end_lineno or field.lineno) + 1)
    said = [notes[line] for line in lines if line in notes]
    above, line = [], field.lineno - 1
    while line in alone:
        above.insert(0, notes[line])
        line -= 1
    return Key(
        name=ast.unparse(field.target),
        type=ast.unparse(field.annotation),
        default="" if field.value is None else _as_yaml(ast.unparse(field.value)),
        comment=re.sub(r"\bNone\b", "null", " ".join([*above, *said])),
    )


def _as_yaml(default: str) -> str:
    """A default as a recipe would say it; what is no plain value stays as it is."""
    try:
        value = eval(default, {"__builtins__": {}})  # constants of our own source
    except NameError:
        return "{}" if default.startswith("Field(default_factory=dict") else default
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return value if isinstance(value, str) else {None: "null"}.get(value, str(value).lower())


def _aliases() -> dict[str, str]:
    """Names that stand for a type in the schema's files, and what a reader wants to see."""
    found = dict(NUMBERS)
    for file in FILES:
        for node in ast.parse((CONFIG / file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                text = ast.unparse(node.value)
                if text.startswith("Literal["):
                    found[node.targets[0].id] = text
    return found


def readable(annotation: str) -> str:
    """A type as a reader of recipes wants it: choices, bounds, `null` for what may be left out."""
    text = annotation
    for name, stands_for in _aliases().items():
        text = re.sub(rf"\b{name}\b", stands_for, text)
    for _ in range(2):  # an alias of an alias
        text = re.sub(
            r"Literal\[([^\[\]]*)\]", lambda m: m[1].replace("'", "").replace(", ", " | "), text
        )
    text = re.sub(r"Annotated\[(\w+), Field\(([^()]*)\)\]", _bounded, text)
    text = re.sub(r"Annotated\[(\w+), [^\[\]]*\]", r"\1", text)
    text = re.sub(r"tuple\[([^\[\]]*), \.\.\.\]", r"list of \1", text)
    text = re.sub(r"dict\[str, (\w+)\]", r"mapping to \1", text)
    return text.replace("None", "null").replace(" | null", ", or null")


def _choices(found: re.Match[str]) -> str:
    return found[1].replace("'", "").replace(", ", " | ")


def _bounded(found: re.Match[str]) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = (part.split("=") for part in found[2].split(", "))
    known = [f"{signs[name]} {float(value):g}" for name, value in bounds if name in signs]
    return " ".join([found[1], ", ".join(known)]).strip()


def all_keys() -> Iterator[tuple[str, str, list[Key]]]:
    """(path, what the section is, its plain keys) from the top of a recipe downwards."""
    known = sections()

    def fields_of(name: str) -> list[Key]:
        own = {key.name: key for key in known[name].fields}
        above = [key for base in known[name].bases if base in known for key in fields_of(base)]
        return [*(own.pop(key.name, key) for key in above), *own.values()]

    def walk(path: str, name: str) -> Iterator[tuple[str, str, list[Key]]]:
        plain, deeper = [], []
        for key in fields_of(name):
            inner = next((one for one in known if one in key.type.replace("[", " ").split()), None)
            inner = inner or next((one for one in known if f" {one}]" in key.type), None)
            if inner is None:
                plain.append(key)
            else:
                below = f"{key.name}.<name>" if key.type.startswith("dict") else key.name
                deeper.append((f"{path}.{below}".lstrip("."), inner))
        yield path, known[name].summary, plain
        for where, inner in deeper:
            yield from walk(where, inner)

    return walk("", "RunConfig")


class Keys(SphinxDirective):
    """A heading and a table for every section."""

    def run(self) -> list[nodes.Node]:
        text: list[str] = []
        for path, summary, keys in all_keys():
            text += [f"## {path or 'top level'}", "", summary, ""]
            if keys:
                text += ["| key | type | default | |", "|---|---|---|---|"]
                text += [
                    f"| `{key.name}` | {_cell(readable(key.type))} | `{_cell(key.default)}` "
                    f"| {_cell(key.comment)} |"
                    for key in keys
                ]
            text.append("")
        content = StringList(text, source=str(CONFIG / "schema.py"))
        return self.parse_content_to_nodes_with(content)

    def parse_content_to_nodes_with(self, content: StringList) -> list[nodes.Node]:
        holder = nodes.section()
        self.state.nested_parse(content, self.content_offset, holder, match_titles=True)
        return holder.children


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;") or " "


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("keys", Keys)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
