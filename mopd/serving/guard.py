"""Runs a command in a process group that ends with whoever started it.

`python -I guard.py WORDS...` with a pipe as its standard input: when the pipe closes, also because
the writer was killed, the whole group of the command is ended, and the folder that
``MOPD_GUARD_FOLDER`` names is removed; that of a command that ended by itself stays, to be read.
Standard library only, and run as a file: this folder must stay off its path, for the names that it
shares with the library.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time

GRACE_SECONDS = 10.0
FOLDER_VARIABLE = "MOPD_GUARD_FOLDER"  # of the command, which its starter may not live to remove


def main(words: list[str]) -> int:
    """The command's exit code, as shells write it: 128 + n for signal n."""
    starter = os.getppid()
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starter decides
    # out of the environment: the command may start guards of its own
    folder, has_ended = os.environ.pop(FOLDER_VARIABLE, None), False
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while not (has_ended := process.poll() is not None) and not asked:
            readable, _, _ = select.select([0], [], [], 0.2)
            if readable and not os.read(0, 4096):
                break
            if os.getppid() != starter:  # a fork of it may still hold the pipe
                break
    finally:
        _end_group(process)
        if folder is not None and not has_ended:
            shutil.rmtree(folder, ignore_errors=True)
    code = process.returncode
    return code if code >= 0 else 128 - code


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            process.poll()  # reaps the leader, so that an empty group disappears
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
