"""Where the recipes lie: `recipes/` of a checkout, `mopd/recipes/` of an installed package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def recipes_of(package: Path) -> Path:
    """The directory of recipes for the package that lies at ``package``.

    The package's own comes first: beside an installed one lie other projects' folders.
    """
    packaged = package / "recipes"
    return packaged if packaged.is_dir() else package.parent / "recipes"


RECIPES = recipes_of(_PACKAGE)
