"""`mopd world [--dir D]`: build the embedded world, or show where it is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mopd.cli.words import Parser
from mopd.config.schema import RunConfig


def run(words: Sequence[str]) -> int:
    """Build on first use (minutes on two cores), then print the paths that a recipe can name."""
    options = parser().parse_args(words)

    # After parsing: this import brings torch in.
    from mopd.demo import ensure_world

    if options.json:
        world = ensure_world(options.dir, progress=False)
        paths = {
            "student.model": world.student,
            **{f"teachers.{name}.model": path for name, path in world.teachers.items()},
            "data.path": world.data,
            "data.heldout_path": world.heldout,
        }
        print(json.dumps({key: str(path) for key, path in paths.items()}, indent=2))
        return 0
    world = ensure_world(options.dir)
    print(f"student.model={world.student}")
    for name, path in world.teachers.items():
        print(f"teachers.{name}.model={path}")
    print(f"data.path={world.data}")
    print(f"data.heldout_path={world.heldout}")
    return 0


def parser() -> argparse.ArgumentParser:
    found = Parser(prog="mopd world", description="Build the embedded world, or show where it is.")
    default = Path(RunConfig().cache_dir) / "world"
    found.add_argument(
        "--dir", type=Path, default=default, help=f"where worlds are kept (default {default})"
    )
    found.add_argument("--json", action="store_true", help="print the keys of a recipe as JSON")
    return found
