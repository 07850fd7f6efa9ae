"""`mopd plan recipe=<name> [key=value ...]`: who sits on which device, and the memory it takes.

Exit codes: 0 it fits, 1 the estimate is above `cluster.device_memory_gb` somewhere, 2 the recipe is
wrong or its pools do not fit on its cluster.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopd.cli.words import Parser, add_words, parse
from mopd.config.check_servers import is_started
from mopd.config.load import load_config, parse_arguments
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError

if TYPE_CHECKING:
    from mopd.runtime.memory import Share
    from mopd.runtime.placement import Plan


def run(words: Sequence[str]) -> int:
    """Print the plan of a recipe; nothing has to be downloaded, and nothing is started."""
    options, rest = parse(parser(), words)
    recipe, overrides = parse_arguments(rest)
    config = _load(recipe, overrides)
    return _show(config, as_json=options.json, svg=options.svg)


def parser() -> argparse.ArgumentParser:
    found = Parser(
        prog="mopd plan",
        description="Show who sits on which device of the recipe's cluster, and the memory it "
        "takes. Models need not be there: config.json of known ones is in recipes/models.",
    )
    add_words(found)
    found.add_argument("--json", action="store_true", help="print plan and estimate as JSON")
    found.add_argument("--svg", type=Path, metavar="FILE", help="write the picture as SVG, too")
    return found


def _load(recipe: str, overrides: Sequence[str]) -> RunConfig:
    """The recipe as a run would have it. Models of an embedded world that is not built are null."""
    from mopd.demo.fill import WorldFill

    fill = WorldFill(announce=False, build=False)
    config = load_config(recipe, overrides, fill=fill)
    if fill.world_name is None:
        return config
    world = Path(config.cache_dir) / "world" / fill.world_name

    def known(model: str | None) -> str | None:
        path = Path(model or world)
        is_there = world not in path.parents or (path / "config.json").is_file()
        return model if is_there else None

    student = config.student.model_copy(update={"model": known(config.student.model)})
    teachers = {
        name: one.model_copy(update={"model": known(one.model)})
        for name, one in config.teachers.items()
    }
    return config.model_copy(update={"student": student, "teachers": teachers})


def _show(config: RunConfig, *, as_json: bool, svg: Path | None) -> int:
    from mopd.cli.plan_svg import picture_svg
    from mopd.cli.plan_text import describe
    from mopd.config.check import check_config
    from mopd.runtime.demand import student_ranks
    from mopd.runtime.memory import estimate, read_shapes, taking_turns, too_large
    from mopd.runtime.nodes import device_here
    from mopd.runtime.placement import place

    ranks = student_ranks(config)
    check_config(config, world_size=ranks, files=False)
    # torchrun starts as many ranks on every node, Ray as many as go there
    plan = place(
        config,
        world_size=ranks if config.launcher == "torchrun" else None,
        device=device_here(config),
    )
    shares: tuple[Share, ...] = ()
    problems: list[str] = []
    notes = [*plan.notes]
    if config.student.model is None:
        notes.append(
            "memory is left out: student.model is not set, and the embedded world that a run "
            "takes then is not built yet (mopd world)"
        )
    else:
        shares = estimate(config, plan, read_shapes(config))
        problems = too_large(config, plan, shares)
        notes += taking_turns(config, plan, shares)
        notes += _unknown_models(config)
    if svg is not None:
        _write(svg, picture_svg(plan, title=config.run.name))
    if as_json:
        print(json.dumps(_as_json(plan, shares, problems, notes), indent=2))
    else:
        print(describe(config, plan, shares, problems=problems, notes=notes))
        if svg is not None:
            print(svg)
    return 1 if problems else 0


def _unknown_models(config: RunConfig) -> Iterator[str]:
    for name, teacher in config.teachers.items():
        own = teacher.backend.type in ("hf", "megatron") or is_started(teacher.backend)
        if own and teacher.model is None and teacher.weight > 0:
            yield f"memory of teachers.{name} is left out: teachers.{name}.model is not set"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--svg: {path} cannot be written: {error.strerror}") from error


def _as_json(
    plan: Plan, shares: Sequence[Share], problems: Sequence[str], notes: Sequence[str]
) -> dict[str, Any]:
    from mopd.runtime.memory import ASSUMPTIONS

    members = [
        {
            "owner": share.owner,
            "what": share.what,
            "pool": share.pool,
            "numbers": list(share.numbers),
            "bytes": {**share.parts, "total": share.total},
        }
        for share in shares
    ]
    memory = {"members": members, "assumptions": ASSUMPTIONS} if shares else None
    return {
        "plan": asdict(plan) | {"notes": [*notes]},
        "memory": memory,
        "problems": [*problems],
    }
