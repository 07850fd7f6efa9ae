"""Slurm's commands as small scripts, so that a batch script runs whole on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.runs import ROOT, environment

JOB = 7700
# All nodes are this one.
SCONTROL = """
if [ "$1" = show ]; then
    for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do echo 127.0.0.1; done
else
    echo "$@" >>"$FAKE_SLURM/scontrol"
fi
"""
# A task per node. As with the real one, SIGTERM to srun itself kills them.
SRUN = """
printf '%s\\n' "$*" >>"$FAKE_SLURM/srun"
tasks=$SLURM_JOB_NUM_NODES
while [[ $1 == --* ]]; do
    case $1 in --ntasks=*) tasks=${1#*=} ;; esac
    shift
done
pids=()
# a task may have done its work before its number is noted
trap 'kill -KILL $(jobs -p); exit 137' TERM
for ((node = 0; node < tasks; node++)); do
    SLURM_NODEID=$node "$@" &
    pids+=($!)
done
echo "${pids[@]}" >"$FAKE_SLURM/tasks"
highest=0
for pid in "${pids[@]}"; do
    status=0
    wait "$pid" || status=$?
    if [ "$status" -gt "$highest" ]; then highest=$status; fi
done
exit "$highest"
"""
# To the tasks alone, as where Slurm follows processes by cgroups.
SCANCEL = """
echo "$@" >>"$FAKE_SLURM/scancel"
read -ra pids <"$FAKE_SLURM/tasks"
kill "-${1#--signal=}" "${pids[@]}"
"""


class Slurm:
    """An allocation of ``nodes`` nodes, all of them this machine; notes go to ``folder``."""

    def __init__(self, folder: Path, *, nodes: int) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir(parents=True)
        for name, text in {"scontrol": SCONTROL, "srun": SRUN, "scancel": SCANCEL}.items():
            write_program(programs / name, text)
        self.variables = {
            **environment(),
            "PATH": f"{programs}:{os.environ['PATH']}",
            "FAKE_SLURM": str(folder),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": str(JOB),
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": f"node[0-{nodes - 1}]",
            "SLURM_CPUS_ON_NODE": "2",
            "MOPD_DEVICE": "cpu",
            "MOPD_PYTHON": sys.executable,
        }

    def start(self, script: str, words: list[str], **variables: str) -> subprocess.Popen[str]:
        """The batch script in a session of its own; its output is on one pipe."""
        return subprocess.Popen(
            ["bash", str(ROOT / script), *words],
            cwd=self.folder,
            env=self.variables | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def noted(self, program: str) -> list[str]:
        """The words of every call of one of the commands, a line each."""
        file = self.folder / program
        return file.read_text().splitlines() if file.exists() else []


def write_program(path: Path, text: str) -> None:
    """An executable bash script."""
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)
