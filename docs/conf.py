"""Sphinx: the site of these pages, `make docs`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from sphinx.application import Sphinx  # noqa: E402

from mopd import __version__  # noqa: E402

project = "mopd"
author = "The mopd authors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "schema_keys",
]
myst_heading_anchors = 4
default_role = "code"
exclude_patterns = ["results/*.md", "examples/*.md"]

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "mopd"
html_show_sourcelink = False
copybutton_prompt_text = "$ "


def drop_empty_patterns(app: Sphinx, name: str, source: list[str]) -> None:
    """Of the contents: patterns that no page matches, which Sphinx warns of."""
    if name == "index":
        docs = Path(app.srcdir)
        kept = (
            line
            for line in source[0].splitlines(keepends=True)
            if not line.strip().endswith("*") or any(docs.glob(f"{line.strip()}.md"))
        )
        source[0] = "".join(kept)


def setup(app: Sphinx) -> None:
    app.connect("source-read", drop_empty_patterns)
