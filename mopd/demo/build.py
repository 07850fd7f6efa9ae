"""Building a world once: jobs in spawned processes, a lock, an atomic rename."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import queue
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mopd.demo.progress import BuildProgress
from mopd.demo.spec import BUILDER_VERSION, PEER, TEACHERS, Report, World, WorldSpec
from mopd.demo.tasks import make_splits, write_splits
from mopd.errors import ArtifactError

NUM_PROCESSES = 2
POLL_SECONDS = 0.1

JobResult = tuple[dict[str, Any], float]  # the job's part of the report, and its seconds

_events: Any = None  # in a job's process: the queue of progress events


def ensure_world(
    root: str | Path, *, spec: WorldSpec | None = None, progress: bool = True
) -> World:
    """The world of ``spec`` under ``root``, built on first use and reused from then on.

    The directory's name is the recipe's digest, so a changed spec builds beside the old world.
    Concurrent callers wait for the one that builds. Jobs are spawned processes: a script that
    calls this needs the usual ``if __name__ == "__main__"``. Raises ArtifactError when a job's
    process dies.
    """
    _refuse_in_job("ensure_world")
    spec = WorldSpec() if spec is None else spec
    root = Path(root).resolve()
    root.mkdir(parents=True, exist_ok=True)
    path = root / spec.digest()
    with (
        BuildProgress(enabled=progress) as display,
        _locked(root, name=spec.digest(), display=display),
    ):
        if (path / "world.json").is_file():
            display.line(f"world: reusing {path}")
        else:
            _build(path, spec=spec, display=display)
    return load_world(path)


def load_world(path: Path) -> World:
    """The handle on a complete world; ArtifactError when there is none at ``path``."""
    try:
        report = json.loads((path / "world.json").read_text())
        report["seconds"] = json.loads((path / "timing.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ArtifactError(
            f"{path} is no complete world: delete it to rebuild ({error})"
        ) from error
    return World(path=path, report=report)


def ensure_peer(world: World, *, progress: bool = True) -> Path:
    """The teacher with the student's own tokenizer, for both domains: ``world.peer``.

    Most recipes have no use for it, so it is built when first asked for. ``report.json`` inside
    has its accuracies. The rules of `ensure_world` hold: callers wait, and need a main guard.
    """
    _refuse_in_job("ensure_peer")
    name = f"{world.path.name}.{PEER}"
    with (
        BuildProgress(enabled=progress) as display,
        _locked(world.path.parent, name=name, display=display),
    ):
        if (world.peer / "report.json").is_file():
            display.line(f"world: reusing {world.peer}")
        else:
            _build_peer(world, staging=world.path.parent / f".{name}.building", display=display)
    return world.peer


def _refuse_in_job(function: str) -> None:
    """A job's process importing an unguarded script would wait for its own parent's lock."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ArtifactError(f'call {function} under `if __name__ == "__main__"`: it spawns jobs')


@contextmanager
def _locked(root: Path, *, name: str, display: BuildProgress) -> Iterator[None]:
    """Exclusive among processes; the kernel drops the lock of a process that dies."""
    with (root / f".{name}.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            display.line("world: another process is building this world, waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(path: Path, *, spec: WorldSpec, display: BuildProgress) -> None:
    """Everything into a sibling first: a crash leaves a sibling, never half a world."""
    staging = path.parent / f".{path.name}.building"
    for leftover in (staging, path):
        if leftover.exists():
            shutil.rmtree(leftover)
    staging.mkdir()
    started = time.monotonic()
    display.line(f"world: building {path} (once; later runs reuse it)")
    write_splits(staging / "data", splits=make_splits(spec))
    report, seconds = _run_jobs(staging, spec=spec, display=display)
    report = {"builder_version": BUILDER_VERSION, "spec": asdict(spec), **report}
    seconds["total"] = round(time.monotonic() - started, 2)
    # Times differ between builds, so they have a file of their own: world.json is reproducible.
    (staging / "timing.json").write_text(json.dumps(seconds, indent=2) + "\n")
    (staging / "world.json").write_text(json.dumps(report, indent=2) + "\n")
    os.replace(staging, path)
    display.line(f"world: built in {seconds['total']:.0f} s")


def _build_peer(world: World, *, staging: Path, display: BuildProgress) -> None:
    """As the world itself: complete in a sibling, then renamed."""
    spec = WorldSpec(**world.report["spec"])
    for leftover in (staging, world.peer):
        if leftover.exists():
            shutil.rmtree(leftover)
    display.line(f"world: building {world.peer} (once; later runs reuse it)")
    with _pool() as (pool, events):
        job = pool.submit(_peer_job, spec, staging=staging)
        _show({PEER: job}, events=events, display=display)
        report, _ = job.result()
    (staging / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    os.replace(staging, world.peer)


@contextmanager
def _pool() -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    """The processes that jobs run in, and the queue of their progress events."""
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    try:
        with ProcessPoolExecutor(
            NUM_PROCESSES, mp_context=context, initializer=_start_process, initargs=(events,)
        ) as pool:
            yield pool, events
    except BrokenProcessPool as error:
        raise ArtifactError(
            "a process of the world's build died: call the build under "
            '`if __name__ == "__main__"`, and see that memory suffices'
        ) from error


def _run_jobs(
    staging: Path, *, spec: WorldSpec, display: BuildProgress
) -> tuple[dict[str, Any], dict[str, float]]:
    """Teachers and student side by side, then the measurements over all of them."""
    with _pool() as (pool, events):
        jobs = {
            **{
                f"teacher {name}": pool.submit(_teacher_job, spec, name=name, staging=staging)
                for name in TEACHERS
            },
            "student": pool.submit(_student_job, spec, staging=staging),
        }
        _show(jobs, events=events, display=display)
        results = {name: job.result() for name, job in jobs.items()}
        last = {"measure": pool.submit(_measure_job, spec, staging=staging)}
        _show(last, events=events, display=display)
        measured, measure_seconds = last["measure"].result()
    teachers = {name: results[f"teacher {name}"] for name in TEACHERS}
    cold_start, student_seconds = results["student"]
    report = {
        "teachers": {name: result for name, (result, _) in teachers.items()},
        "cold_start": cold_start,
        **measured,
    }
    seconds = {f"teacher_{name}": spent for name, (_, spent) in teachers.items()}
    seconds.update(student=student_seconds, measure=measure_seconds)
    return report, seconds


def _show(jobs: dict[str, Future[Any]], *, events: Any, display: BuildProgress) -> None:
    """Forward progress until every job is done; a failed job's exception is raised at once."""
    while True:
        running = False
        for job in jobs.values():
            if not job.done():
                running = True
            elif job.exception() is not None:
                job.result()
        try:
            phase, step, steps, note = events.get(timeout=POLL_SECONDS)
            display.update(phase, step=step, steps=steps, note=note)
        except queue.Empty:
            if not running:
                return


def _start_process(events: Any) -> None:
    """One thread and quiet libraries: the files depend on the order of every addition."""
    global _events
    _events = events
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _timed(phase: str, work: Callable[[Report], dict[str, Any]]) -> JobResult:
    """Run one job; its phase ends when its files are written, however few steps it took."""
    started = time.monotonic()
    result = work(lambda step, steps, note: _events.put((phase, min(step, steps - 1), steps, note)))
    seconds = round(time.monotonic() - started, 2)
    _events.put((phase, 1, 1, f"done in {seconds:.0f} s"))
    return result, seconds


def _teacher_job(spec: WorldSpec, *, name: str, staging: Path) -> JobResult:
    from mopd.demo.train import train_teacher

    directory = staging / "teachers" / name
    return _timed(
        f"teacher {name}",
        lambda report: train_teacher(spec, name=name, directory=directory, report=report),
    )


def _peer_job(spec: WorldSpec, *, staging: Path) -> JobResult:
    from mopd.demo.train import train_peer

    return _timed(PEER, lambda report: train_peer(spec, directory=staging, report=report))


def _student_job(spec: WorldSpec, *, staging: Path) -> JobResult:
    from mopd.demo.train import train_student

    directory = staging / "student"
    return _timed("student", lambda report: train_student(spec, directory=directory, report=report))


def _measure_job(spec: WorldSpec, *, staging: Path) -> JobResult:
    from mopd.demo.measure import measure

    return _timed("measure", lambda report: measure(spec, directory=staging))
