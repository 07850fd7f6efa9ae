"""One run as a directory: fresh, continued or finished; sinks, summary, verdict."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mopd.config.load import dump_config
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError, DidNotLearnError
from mopd.metrics.console import ConsoleSink
from mopd.metrics.sinks import JsonlSink, MultiSink, Sink, TensorBoardSink
from mopd.metrics.summary import Summary, print_summary, write_summary
from mopd.metrics.wandb_sink import WandbSink
from mopd.runtime.build import build_run
from mopd.runtime.installed import write_versions
from mopd.runtime.loop import refuse_if_not_learned, train
from mopd.runtime.reached import ServerSource
from mopd.runtime.servers import Servers, is_failed_start
from mopd.runtime.signals import Interrupt
from mopd.runtime.teachers import recognise
from mopd.runtime.watchdog import Watchdog
from mopd.student.parallel import shutdown

# How servers are reached: what the remedies for servers that failed ask to change.
_REACHED = (
    *("urls", "api_key_env", "deadline_s", "start_s", "max_retries", "max_outstanding"),
    *("restart_budget_s", "server", "served_model", "entries_per_request"),
    *("tolerance", "canary_interval", "probe_tolerance", "sync_dir", "weight_sync"),
    "memory_fraction",
)
# Keys that may differ when a run is continued: they change nothing that is computed, but for
# rounding where the layout differs.
_FREE = (
    ("run", "overwrite"),
    ("run", "threads"),
    ("run", "stall_s"),
    ("logging",),
    ("debug",),
    ("checkpoint",),
    ("student", "parallel"),
    ("student", "optimizer", "use_distributed_optimizer"),
    ("journal",),
    ("cluster",),
    ("pools",),
    ("ray",),
    ("launcher",),
    ("teachers", "*", "pool"),
    ("rollout", "pool"),
    *(("teachers", "*", "backend", key) for key in (*_REACHED, "offload")),
    *(("rollout", "backend", key) for key in _REACHED),
)


def run_session(
    config: RunConfig,
    *,
    world: str | None,
    servers: ServerSource | None = None,
    stop_asked: Callable[[], bool] = lambda: False,
    told: ExitStack | None = None,
) -> Summary | None:
    """Trains, or continues, the run ``run.name``; None when it is finished already.

    Args:
        world: digest of the embedded world, for the summary.
        servers: where engines come from that the recipe has started; None: from this process.
        stop_asked: beside SIGTERM, whether to end after the step that is under way.
        told: closed once the user knows how the run ended; None: the session's own end. Signals
            are heard until then: torchrun tells the ranks beside a dead one to end, and they are
            to say first why they do.
    Raises:
        ConfigError: the directory holds a run with other settings.
        DidNotLearnError: after everything is written, or again for a finished run.
        Stopped: SIGTERM came; a checkpoint of the last step is there.
    """
    directory = Path(config.run.dir) / config.run.name
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        clear_directory(directory, config)
    # with overwrite the main rank is deleting the old one: only it may look
    finished = (directory / "summary.json").exists()
    if finished and (is_main or not config.run.overwrite):
        return report_finished(directory, config, is_main=is_main)
    run = build_run(config, servers or Servers(config))
    if is_main:
        write_config(directory, config)
        write_versions(directory)
    console = ConsoleSink(
        num_steps=config.train.steps,
        log_interval=config.logging.log_interval,
        title=config.run.name,
    )
    sink = _sinks(config, directory, console) if is_main else MultiSink([])
    watchdog = Watchdog(config.run.stall_s, directory=directory, rank=run.topology.rank)
    interrupt = Interrupt()

    def progress() -> None:
        watchdog.feed()
        interrupt.check()

    run = dataclasses.replace(
        run,
        finished=progress,
        stop_asked=lambda: interrupt.is_stopping or stop_asked(),
        activity=console.activity if is_main else run.activity,
    )
    # All are closed, in the reverse order, whichever of them fails.
    with ExitStack() as opened:
        (told or opened).enter_context(interrupt)
        opened.callback(shutdown)
        opened.callback(sink.close)
        for part in (run.servers, run.turns, run.sampler, run.pool, run.feed):
            if part is not None:
                opened.callback(part.close)
        if run.pool is not None and run.topology.dp_rank == 0:
            recognise(directory, run.pool.teachers)
        with watchdog:
            summary = dataclasses.replace(train(run, sink), world=world)
    if is_main:
        write_summary(directory / "summary.json", summary)
        print_summary(summary)
        print(
            f"{directory}: hf/ (model), metrics.jsonl, summary.json, tensorboard/, journal/, "
            "checkpoints/"
        )
        print(f"`mopd report {directory}` shows it as a page")
    if config.evaluate.fail_if_not_learned:
        refuse_if_not_learned(summary)
    return summary


def clear_directory(directory: Path, config: RunConfig) -> None:
    """Refuses a run with other settings, or removes it with ``run.overwrite``."""
    path = directory / "config.yaml"
    if config.run.overwrite and directory.exists():
        if not path.exists() and not is_failed_start(directory):
            raise ConfigError(f"{directory} is not a run, so run.overwrite leaves it; use another")
        shutil.rmtree(directory)
    if path.exists():
        _refuse_changes(path, config)


def write_config(directory: Path, config: RunConfig) -> None:
    """Only once everything could be built: a start that failed binds nobody to its settings."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / "config.yaml.tmp"
    temporary.write_text(dump_config(config), encoding="utf-8")
    os.replace(temporary, directory / "config.yaml")


def report_finished(directory: Path, config: RunConfig, *, is_main: bool) -> None:
    if is_main:
        print(
            f"{directory} is finished: see summary.json; run.overwrite=true trains it again, "
            "run.name=... trains another"
        )
    learned = json.loads((directory / "summary.json").read_text(encoding="utf-8")).get("learned")
    if learned is False and config.evaluate.fail_if_not_learned:
        raise DidNotLearnError(f"{directory}: its held-out accuracy did not rise")


def _refuse_changes(path: Path, config: RunConfig) -> None:
    from omegaconf import OmegaConf

    old = OmegaConf.to_container(OmegaConf.load(path))
    new = config.model_dump(mode="json")
    for key in _FREE:
        for tree in (old, new):
            _drop(tree, key)
    changed = sorted(_differences(old, new))
    if changed:
        raise ConfigError(
            f"{path.parent} holds a run with other settings ({', '.join(changed[:3])}); choose "
            "another run.name, or run.overwrite=true to start afresh"
        )


def _drop(tree: Any, key: tuple[str, ...]) -> None:
    """Removes a key; ``*`` stands for every name."""
    part, *rest = key
    for name in list(tree) if part == "*" else [part]:
        if rest:
            _drop(tree.get(name) or {}, tuple(rest))
        else:
            tree.pop(name, None)


def _differences(old: Any, new: Any, prefix: str = "") -> set[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return {
            found
            for key in old.keys() | new.keys()
            for found in _differences(old.get(key), new.get(key), f"{prefix}{key}.")
        }
    return set() if old == new else {prefix.rstrip(".")}


def _sinks(config: RunConfig, directory: Path, console: ConsoleSink) -> Sink:
    sinks: list[Sink] = [JsonlSink(directory / "metrics.jsonl")]
    if config.logging.tensorboard:
        sinks.append(TensorBoardSink(directory / "tensorboard", config=dump_config(config)))
    if config.logging.wandb:
        sinks.append(
            WandbSink(
                directory,
                project=config.logging.wandb_project,
                name=config.run.name,
                config=config.model_dump(mode="json"),
                say=console.note,
            )
        )
    return MultiSink([*sinks, console])
