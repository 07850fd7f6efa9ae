"""`launch/train.py` with ``launcher=ray``: what comes before Ray itself is imported."""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from mopd.config.schema import RunConfig
from mopd.errors import ConfigError
from mopd.runtime.exits import Ending, ending_of
from mopd.runtime.nodes import device_here
from mopd.runtime.placement import place
from mopd.runtime.ray.berths import asked
from mopd.runtime.ray.head import LocalHead

JOB_FOLDER = "_ray_pkg_"  # where `ray job submit` unpacks a working directory


def run_on_ray(config: RunConfig, *, world: str | None) -> int:
    """Trains to the end; the exit code, after what there is to say was printed."""
    found: list[Ending] = []
    ending = ending_of(lambda: found.append(_run(config, world)))
    ending = found[0] if found else ending
    if ending.message:
        print(ending.message, file=sys.stderr if ending.is_error else sys.stdout, flush=True)
    return ending.code


def _run(config: RunConfig, world: str | None) -> Ending:
    from mopd.runtime.session import clear_directory, report_finished

    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "launcher=ray: ray is not installed here; pip install 'mopd[ray]', or leave launcher "
            "out and start with torchrun"
        )
    _refuse_lost_results(config)
    directory = Path(config.run.dir) / config.run.name
    clear_directory(directory, config)
    if (directory / "summary.json").exists():
        report_finished(directory, config, is_main=True)
        return Ending(code=0)
    # the ranks are not to delete what the engines have written there by then
    run = config.run.model_copy(update={"overwrite": False})
    config = config.model_copy(update={"run": run})
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports to anyone
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    with ExitStack() as opened:
        if address is None:
            wanted = asked(place(config, device=device_here(config)))
            head = LocalHead(num_cpus=int(wanted["CPU"]))
            opened.callback(head.close)
            head.wait()
        # ray reads its token when it is imported
        from mopd.runtime.ray.driver import drive

        return drive(config, address or head.address, world=world, is_own=address is None)


def _refuse_lost_results(config: RunConfig) -> None:
    here = str(Path.cwd())
    if JOB_FOLDER in here and not Path(config.run.dir).is_absolute():
        raise ConfigError(
            f"run.dir: {config.run.dir} would lie in the folder of a Ray job, which goes with it; "
            "give the path of a shared folder"
        )
