"""One study at a time works in a directory, and what it started ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from mopd.config.load import load_config
from mopd.study import run
from mopd.study.results import Raw
from mopd.study.run import Options, StudyError, alone, run_jobs
from mopd.study.settings import Defaults
from mopd.study.spec import Job


def test_a_second_study_is_refused_while_the_first_is_there(tmp_path: Path) -> None:
    work = tmp_path / "study-x"
    with alone(work), pytest.raises(StudyError, match="is in use"), alone(work):
        pass
    with alone(work):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_has_just_begun_ends_with_its_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """The signal comes between the start of its process and the note that it is there."""
    entry = tmp_path / "entry.py"
    entry.write_text("import time; time.sleep(600)")
    monkeypatch.setattr(run, "ENTRY", entry)
    begun: list[subprocess.Popen[bytes]] = []

    class Begun(subprocess.Popen[bytes]):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[call-overload]
            begun.append(self)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(run.subprocess, "Popen", Begun)
    monkeypatch.setattr(run, "code_version", lambda: "0")
    job = Job(arm="plain", seed=1, config=load_config("mopd_ctkd"), overrides=(), after=None)
    options = Options(
        work=tmp_path / "work", num_jobs=1, limit_s=60.0, keep=False, report=lambda line: None
    )
    before = signal.signal(number, signal.default_int_handler)  # not ignored, as in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            run_jobs([job], Raw(tmp_path / "raw"), Defaults(tmp_path / "defaults"), options)
        (process,) = begun
        assert process.returncode == -signal.SIGTERM
    finally:
        for process in begun:
            process.kill()
            process.wait()
        kept = signal.signal(number, before)
    assert kept is signal.default_int_handler
