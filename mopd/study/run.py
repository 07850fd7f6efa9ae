"""Runs the jobs of a study as processes of launch/train.py, some at a time, and keeps results."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mopd import __version__
from mopd.config.load import dump_config
from mopd.config.schema import RunConfig
from mopd.errors import MopdError
from mopd.study.results import Raw, Result, Status, read_run
from mopd.study.settings import Defaults, same
from mopd.study.spec import Job

ENTRY = Path(__file__).resolve().parents[2] / "launch" / "train.py"
BULKY = ("checkpoints", "journal", "tensorboard", "projections")
POLL_S = 0.2
GRACE_S = 60.0  # from SIGTERM to the end of the step, its checkpoint, and SIGKILL
WALL_FACTOR = 20.0  # a run that waits for ever uses no CPU time


class StudyError(MopdError):
    """A study cannot work here now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """``work`` has one directory a run; ``report`` gets a line about every run that ends."""

    work: Path
    num_jobs: int
    limit_s: float
    keep: bool
    report: Callable[[str], None]


@dataclass(slots=True, kw_only=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    began: float
    continued: bool
    code: str
    told_at: float | None = None  # when SIGTERM was sent


def run_jobs(jobs: Sequence[Job], raw: Raw, known: Defaults, options: Options) -> int:
    """Runs what is not done yet, and returns how many runs failed or were stopped.

    A run that was interrupted goes on from its checkpoint. One that fails does not hold up others,
    but those that start from its student cannot run. When this process is told to end, its runs
    are too, each behind a checkpoint.

    Raises:
        KeyboardInterrupt: this process was told to end, and its runs have.
        StudyError: another process, or a run that one left behind, works in the same directory.
    """
    with alone(options.work) as lock:
        runner = _Runner(jobs, raw, known, options, lock)
        with _signals(runner.interrupt):
            try:
                return runner.run()
            finally:
                runner.close()


@contextmanager
def alone(work: Path) -> Iterator[int]:
    """A lock on ``work``; runs inherit it, so that it lasts as long as the last of them."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StudyError(
                f"{work} is in use: another `mopd study` is at work there, or a run that one left "
                "behind when it was killed; wait for it, or end it"
            ) from error
        yield file.fileno()


@contextmanager
def _signals(handler: Callable[..., None]) -> Iterator[None]:
    """SIGTERM and Ctrl-C for ``handler``; a SIGINT that is ignored stays so."""
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        numbers.append(signal.SIGINT)
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class _Runner:
    def __init__(
        self, jobs: Sequence[Job], raw: Raw, known: Defaults, options: Options, lock: int
    ) -> None:
        self._raw, self._known, self._options, self._lock = raw, known, options, lock
        self._settings = {job.name: known.settings(job.config) for job in jobs}
        for job in jobs:
            if job.after is not None:
                self._settings[job.name]["after"] = job.after
        self._jobs = {job.name: job for job in jobs}
        self._waiting = [job for job in jobs if not self._is_done(job)]
        needed = [self._parent(job) for job in self._waiting]
        for parent in reversed([one for one in needed if one is not None]):
            if parent not in self._waiting and self._student(parent) is None:
                self._waiting.insert(0, parent)
        self._total = len(self._waiting)
        self._running: list[_Running] = []
        self._bad = 0
        self._seconds: list[float] = []
        self._is_interrupted = self._is_ending = False

    def interrupt(self, *_: object) -> None:
        """A handler of signals. Raised anywhere, an interrupt would lose a run that was just
        started, which nobody would end, or the result of one that just ended."""
        self._is_interrupted = True
        if self._is_ending:
            raise KeyboardInterrupt

    def run(self) -> int:
        skipped = len(self._jobs) - self._total
        self._options.report(f"{self._total} runs to make, {skipped} are done")
        while self._waiting or self._running:
            while len(self._running) < self._options.num_jobs and (job := self._next()):
                self._start(job)
                self._check()
            for running in list(self._running):
                self._watch(running)
            self._check()
            time.sleep(POLL_S if self._running else 0.0)
        return self._bad

    def _check(self) -> None:
        if self._is_interrupted:
            raise KeyboardInterrupt

    def close(self) -> None:
        """Ends what still runs; when all are told, an interrupt ends the wait for them."""
        for running in self._running:
            running.process.terminate()
        self._is_ending = bool(self._running)
        deadline = time.monotonic() + GRACE_S
        for running in self._running:
            try:
                running.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()

    def _is_done(self, job: Job) -> bool:
        found = self._raw.find(job.arm, job.seed)
        if found is None or found.status == "failed":
            return False
        return same(found.settings, self._settings[job.name])

    def _parent(self, job: Job) -> Job | None:
        return None if job.after is None else self._jobs[f"{job.after}-s{job.seed}"]

    def _student(self, job: Job) -> Path | None:
        """Where the finished run of ``job`` keeps its model."""
        directory = self._options.work / job.name / "hf"
        return directory if (directory / "config.json").exists() else None

    def _next(self) -> Job | None:
        """The first that can start; one whose student will never come is booked as failed."""
        for job in list(self._waiting):
            parent = self._parent(job)
            if parent is None or self._student(parent) is not None:
                self._waiting.remove(job)
                return job
            if parent not in self._waiting and all(r.job is not parent for r in self._running):
                self._waiting.remove(job)
                self._book(job, "failed", error=f"{parent.name}, whose student it needs, failed")
        return None

    def _start(self, job: Job) -> None:
        directory = self._options.work / job.name
        recipe = self._recipe(job)
        if _was_other(directory, recipe) or (directory / "summary.json").exists():
            shutil.rmtree(directory)  # to be made again: another recipe, or its result is gone
        recipe_path = self._options.work / f"{job.name}.yaml"
        recipe_path.parent.mkdir(parents=True, exist_ok=True)
        recipe_path.write_text(recipe, encoding="utf-8")
        with (self._options.work / f"{job.name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(ENTRY), f"recipe={recipe_path.resolve()}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
                pass_fds=(self._lock,),
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
            )
        continued = (directory / "checkpoints").exists()
        self._running.append(
            _Running(
                job=job,
                process=process,
                began=time.monotonic(),
                continued=continued,
                code=code_version(),
            )
        )

    def _recipe(self, job: Job) -> str:
        """All that the run is given, resolved; the student of an earlier arm by its directory."""
        config = job.config
        config = _replaced(config, "run", dir=str(self._options.work), threads=1)
        parent = self._parent(job)
        if parent is not None:
            student = self._student(parent)
            assert student is not None
            config = _replaced(config, "student", model=str(student), tokenizer=None)
        return dump_config(config)

    def _watch(self, running: _Running) -> None:
        pid, status, usage = os.wait4(running.process.pid, os.WNOHANG)
        if pid:
            running.process.returncode = os.waitstatus_to_exitcode(status)
            self._running.remove(running)
            self._ended(running, usage.ru_utime + usage.ru_stime)
            return
        now = time.monotonic()
        limit = self._options.limit_s
        spent = cpu_seconds(running.process.pid)
        if running.told_at is None:
            wall = now - running.began
            if wall > WALL_FACTOR * limit or (wall if spent is None else spent) > limit:
                running.process.terminate()
                running.told_at = now
        elif now > running.told_at + GRACE_S:
            running.process.kill()

    def _ended(self, running: _Running, cpu: float) -> None:
        job, code = running.job, running.process.returncode
        status: Status = "done" if code == 0 else "failed"
        error = None
        if running.told_at is not None and code != 0:
            status, error = "stopped", f"the limit of {self._options.limit_s:g} s of CPU time"
        elif code != 0:
            error = f"exit code {code}: {_last_line(self._options.work / f'{job.name}.log')}"
        self._seconds.append(time.monotonic() - running.began)
        cpu_seconds = None if running.continued else cpu
        self._book(job, status, error=error, cpu=cpu_seconds, code=running.code)

    def _book(
        self,
        job: Job,
        status: Status,
        *,
        error: str | None,
        cpu: float | None = None,
        code: str = "",
    ) -> None:
        directory = self._options.work / job.name
        result = Result(
            arm=job.arm,
            seed=job.seed,
            status=status,
            overrides=list(job.overrides),
            settings=self._settings[job.name],
            cpu_seconds=cpu,
            error=error,
            code=code,
        )
        result = replace(result, **read_run(directory))
        self._known.save()
        self._raw.add(result)
        if status != "done":
            self._bad += 1
        if not self._options.keep and status == "done":
            for name in BULKY:
                shutil.rmtree(directory / name, ignore_errors=True)
        self._options.report(f"{self._progress()} {describe(job, result)}")

    def _progress(self) -> str:
        left = len(self._waiting) + len(self._running)
        done = self._total - left
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else 0.0
        minutes = mean * left / self._options.num_jobs / 60.0
        return f"[{done}/{self._total}, {minutes:.0f} min left]"


def describe(job: Job, result: Result) -> str:
    """One line about a run that ended."""
    if result.status != "done":
        return f"{job.name} {result.status}: {result.error}"
    parts = [
        f"{name} {_percent(one['after'])} (canonical {_percent(one['canonical_after'])})"
        for name, one in result.domains.items()
    ]
    return f"{job.name} {', '.join(parts)}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _replaced(config: RunConfig, section: str, **values: object) -> RunConfig:
    """A copy of ``config`` with other values in one section."""
    part = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: part})


def cpu_seconds(pid: int) -> float | None:
    """CPU time of a process and of its children that ended; None where /proc does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def code_version() -> str:
    """The version of mopd, and the commit where there is a repository."""
    command = ["git", "-C", str(ENTRY.parent), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{found.stdout.strip()}"


def _was_other(directory: Path, recipe: str) -> bool:
    """Whether a run stopped half-way was given something else: it cannot be continued then."""
    written = directory.parent / f"{directory.name}.yaml"
    return directory.exists() and written.exists() and written.read_text("utf-8") != recipe


def _environment() -> dict[str, str]:
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    return kept | {"OMP_NUM_THREADS": "1"}


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"
