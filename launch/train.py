"""The training entry: ``torchrun launch/train.py recipe=mopd_ctkd [key=value ...]``.

Exit codes: 0 trained, 1 the run failed or learned nothing, 2 the recipe cannot run,
130 interrupted, 143 stopped by SIGTERM after a checkpoint.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mopd.config import load_config
from mopd.config.check import check_config
from mopd.config.load import parse_arguments
from mopd.demo.fill import WorldFill
from mopd.errors import ConfigError, DidNotLearnError, MopdError, Stopped

INTERRUPTED = 130
STOPPED = 143


def main(argv: Sequence[str]) -> int:
    """Validates first, so that a mistake costs a second; loads torch and the models after that."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        recipe, overrides = parse_arguments(argv)
        fill = WorldFill(announce=is_main)
        config = load_config(recipe, overrides, fill=fill)
        check_config(config, world_size=world_size)
    except ConfigError as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    if is_main and fill.announcement:
        print(fill.announcement)

    try:
        from mopd.runtime.session import run_session

        run_session(config, world=fill.world_name)
    except (ConfigError, DidNotLearnError) as error:  # the main rank meets every one of them
        if is_main:
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        if is_main:
            print("interrupted: the same command continues from the last checkpoint")
        return INTERRUPTED
    except Stopped as error:
        if is_main:
            print(f"{error}; the same command continues", flush=True)
        return STOPPED
    except MopdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not _is_lost_rank(error):
            raise
        print(
            f"error: rank {os.environ.get('RANK', '0')}: another rank ended, or its connection did;"
            " torchrun names the first one under `Root Cause`; the same command continues from the "
            "last checkpoint",
            file=sys.stderr,
        )
        return 1
    return 0


def _is_lost_rank(error: RuntimeError) -> bool:
    from mopd.student.parallel import is_lost_rank

    return is_lost_rank(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
