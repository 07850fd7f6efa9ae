"""`mopd checkpoint list | verify`: the checkpoints of a run, without a model or a tensor."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from mopd.cli.table import table
from mopd.cli.words import Parser
from mopd.errors import ArtifactError, ConfigError
from mopd.metrics.text import printable
from mopd.storage.manifest import (
    CheckpointInfo,
    find_latest,
    is_checkpoint,
    list_checkpoints,
    problems,
    ranked,
    step_of,
)

_FIRST_REPORT_S, _REPORT_EVERY_S = 2.0, 1.0
_AXES = {  # names of the layout, as a table has room for
    **{"tensor": "tp", "pipeline": "pp", "virtual": "vp"},
    **{"context": "cp", "expert": "ep", "data": "dp"},
}


def run(words: Sequence[str]) -> int:
    """Exit code 0; 1 where `verify` finds something wrong."""
    options = parser().parse_args(words)
    return options.run(options)


def parser() -> argparse.ArgumentParser:
    found = Parser(
        prog="mopd checkpoint", description="The checkpoints of a run; no model is built."
    )
    verbs = found.add_subparsers(dest="verb", metavar="VERB", required=True)
    listed = verbs.add_parser("list", help="step, date, size, layout, score, why it is kept")
    listed.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    listed.add_argument("--json", action="store_true", help="print JSON instead of a table")
    listed.set_defaults(run=_list)
    verify = verbs.add_parser("verify", help="compare every byte with the SHA-256 of the manifest")
    verify.add_argument("path", type=Path, metavar="RUN_DIR|CHECKPOINT_DIR")
    verify.add_argument(
        "--all", action="store_true", help="every checkpoint of the run, not the newest alone"
    )
    verify.add_argument("--json", action="store_true", help="print JSON instead of lines")
    verify.set_defaults(run=_verify)
    return found


def _list(options: argparse.Namespace) -> int:
    directory = checkpoints_of(options.run_dir)
    infos = list_checkpoints(directory)
    why = _why_kept(options.run_dir, infos) if infos else {}
    if options.json:
        found = [{**asdict(info), "path": str(info.path), "why": why[info.step]} for info in infos]
        print(json.dumps(found, indent=2))
        return 0
    if not infos:
        print(printable(f"{directory}: no checkpoint"))
        return 0
    rows = [("step", "saved", "size", "layout", "score", "")]
    rows += [(*_cells(info), why[info.step]) for info in infos]
    print(table(rows, right=(0, 2, 4)))
    return 0


def _cells(info: CheckpointInfo) -> tuple[str, str, str, str, str]:
    if info.saved is None:
        return str(info.step), "-", "-", "-", "-"
    layout = " ".join(f"{_AXES.get(name, name)}{n}" for name, n in info.layout.items() if n > 1)
    return (
        str(info.step),
        datetime.fromtimestamp(info.saved).strftime("%Y-%m-%d %H:%M:%S"),
        _bytes(info.size),
        layout or "one rank",
        "-" if info.score is None else f"{info.score:.4g}",
    )


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _why_kept(run_dir: Path, infos: Sequence[CheckpointInfo]) -> dict[int, str]:
    """By step: what the run would take next, which scores are best, what is left over."""
    try:
        newest = find_latest(checkpoints_of(run_dir))
    except ArtifactError as error:
        print(f"mopd: {error}", file=sys.stderr)
        newest = None
    keep_last, keep_best = _kept(run_dir)
    best = {info.step: number for number, info in enumerate(ranked(infos)[:keep_best], 1)}
    # by age, up to the one that the run goes on from: what a save counts
    last = infos[-1].step if newest is None else step_of(newest)
    reached = [info.step for info in infos if info.step <= last]
    found = {}
    for info in infos:
        words = []
        if newest is not None and info.path == newest:
            words.append("newest")
        elif info.step not in reached:
            words.append("later than the newest: of a branch that the run has left")
        elif info.step in reached[-keep_last:]:
            words.append(f"one of the last {keep_last}")
        if info.step in best:
            words.append("best" if best[info.step] == 1 else f"best {best[info.step]}")
        if info.problem is not None:
            words.append("DAMAGED: see mopd checkpoint verify")
        found[info.step] = ", ".join(words) or "goes with the next save"
    return found


def _kept(run_dir: Path) -> tuple[int, int]:
    """``checkpoint.keep_last`` and at least one best one; without the run's recipe the defaults."""
    from mopd.config.load import load_config
    from mopd.config.schema import RunConfig

    path = run_dir / "config.yaml"
    section = (load_config(path) if path.is_file() else RunConfig()).checkpoint
    return section.keep_last, max(1, section.keep_best)


def _verify(options: argparse.Namespace) -> int:
    is_clean = True
    told = []
    for path in _to_verify(options.path, every=options.all):
        found = []
        progress = _Progress(path)
        for problem in problems(path, report=progress):
            progress.clear()
            if not options.json:
                print(printable(problem), flush=True)
            found.append(problem)
        progress.clear()
        told.append({"path": str(path), "bytes": progress.total, "problems": found})
        if not found and not options.json:
            print(printable(f"{path}: intact ({_bytes(progress.total)})"), flush=True)
        is_clean = is_clean and not found
    if options.json:
        print(json.dumps(told, indent=2))
    return 0 if is_clean else 1


def _to_verify(path: Path, *, every: bool) -> Iterator[Path]:
    if is_checkpoint(path):
        if every:
            raise ConfigError(f"--all: {path} is one checkpoint; name its run")
        yield path
        return
    directory = checkpoints_of(path)
    infos = list_checkpoints(directory)
    if not infos:
        raise ConfigError(f"{directory} has no checkpoint; name a run that has saved one")
    if every:
        yield from (info.path for info in infos)
        return
    try:
        newest = find_latest(directory)
    except ArtifactError as error:
        raise ConfigError(str(error)) from error
    yield newest or infos[-1].path


def checkpoints_of(run_dir: Path) -> Path:
    """Raises ConfigError where ``run_dir`` is no run."""
    directory = run_dir / "checkpoints"
    if not directory.is_dir():
        raise ConfigError(
            f"{run_dir} is no run with checkpoints; name the directory with config.yaml and "
            "checkpoints/ in it, as in runs/default"
        )
    return directory


class _Progress:
    """A line on stderr that tells how far a long reading is; silent for a short one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        self._began = time.monotonic()
        self._told = 0.0
        self._is_terminal = sys.stderr.isatty()
        self.total = 0  # bytes that were read

    def __call__(self, name: str, size: int) -> None:
        self.total += size
        now = time.monotonic()
        if now - self._began < _FIRST_REPORT_S or now - self._told < _REPORT_EVERY_S:
            return
        self._told = now
        share = self.total / max(1, self._size)
        text = (
            f"{self._path.name}: {_bytes(self.total)} of {_bytes(self._size)} ({share:.0%}) {name}"
        )
        # over the line before it on a terminal, in lines of their own in a log
        end = "" if self._is_terminal else "\n"
        start = "\r\033[K" if self._is_terminal else ""
        print(f"{start}{text}", end=end, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._told and self._is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
