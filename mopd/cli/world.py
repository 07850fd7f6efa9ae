"""`mopd world [--dir D]`: build the embedded world, or show where it is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mopd.config.schema import RunConfig


def run(words: Sequence[str]) -> int:
    """Build on first use (minutes on two cores), then print the paths that a recipe can name."""
    parser = argparse.ArgumentParser(
        prog="mopd world", description="Build the embedded world, or show where it is."
    )
    default = Path(RunConfig().cache_dir) / "world"
    parser.add_argument(
        "--dir", type=Path, default=default, help=f"where worlds are kept (default {default})"
    )
    options = parser.parse_args(words)

    # After parsing: this import brings torch in.
    from mopd.demo import ensure_world

    world = ensure_world(options.dir)
    print(f"student.model={world.student}")
    for name, path in world.teachers.items():
        print(f"teachers.{name}.model={path}")
    print(f"data.path={world.data}")
    print(f"data.heldout_path={world.heldout}")
    return 0
