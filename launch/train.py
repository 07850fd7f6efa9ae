"""The training entry: ``torchrun launch/train.py recipe=mopd_ctkd [key=value ...]``.

With ``launcher=ray`` and plain python it starts the ranks itself, as actors (docs/ray.md).

Exit codes: 0 trained, 1 the run failed or learned nothing, 2 the recipe cannot run,
130 interrupted, 143 stopped by SIGTERM after a checkpoint.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mopd.config import load_config
from mopd.config.check import check_config
from mopd.config.load import parse_arguments
from mopd.config.schema import RunConfig
from mopd.demo.fill import WorldFill
from mopd.errors import ConfigError
from mopd.runtime.demand import student_ranks
from mopd.runtime.exits import Ending, ending_of
from mopd.runtime.signals import INTERRUPTED


def main(argv: Sequence[str]) -> int:
    """Validates first, so that a mistake costs a second; loads torch and the models after that."""
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        recipe, overrides = parse_arguments(argv)
        fill = WorldFill(announce=is_main)
        config = load_config(recipe, overrides, fill=fill)
        check_config(config, world_size=_world_size(config))
    except ConfigError as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    if is_main and fill.announcement:
        print(fill.announcement)
    if config.launcher == "ray":
        from mopd.runtime.ray.launch import run_on_ray

        return run_on_ray(config, world=fill.world_name)
    return _run_here(config, world=fill.world_name, is_main=is_main)


def _world_size(config: RunConfig) -> int:
    if config.launcher != "ray":
        return int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" in os.environ:
        raise ConfigError(
            "launcher: ray starts the ranks itself; use `python launch/train.py`, without torchrun"
        )
    return student_ranks(config)


def _run_here(config: RunConfig, *, world: str | None, is_main: bool) -> int:
    """This process is one rank of the job, or the whole job."""
    with ExitStack() as told:

        def work() -> None:
            from mopd.runtime.session import run_session

            run_session(config, world=world, told=told)

        ending = ending_of(work)
        _tell(ending, is_main=is_main)
    return ending.code


def _tell(ending: Ending, *, is_main: bool) -> None:
    if ending.is_lost:
        print(
            f"error: rank {os.environ.get('RANK', '0')}: another rank ended, or its connection did;"
            " torchrun names the first one under `Root Cause`; the same command continues from the "
            "last checkpoint",
            file=sys.stderr,
            flush=True,
        )
    elif ending.message and (is_main or ending.everywhere):
        print(ending.message, file=sys.stderr if ending.is_error else sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
