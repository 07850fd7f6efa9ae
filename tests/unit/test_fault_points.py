"""Fault points are inert, unless somebody asks."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from mopd import fault_points
from tests.helpers.runs import ROOT, environment
from tests.helpers.source import shipped

PROGRAM = """
from mopd.fault_points import fault_point
for count in range(3):
    fault_point("save.renamed")
    fault_point("save.pruned")
    print(count, flush=True)
"""


def run(wanted: str | None) -> subprocess.CompletedProcess[str]:
    extra = {} if wanted is None else {"MOPD_FAULT_POINT": wanted}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment() | extra,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_environment_names_a_place_to_die() -> None:
    assert run(None).stdout.split() == ["0", "1", "2"]
    killed = run("save.pruned:2")
    assert killed.returncode == -signal.SIGKILL and killed.stdout.split() == ["0"]
    assert "no fault point 'save.nowhere'" in run("save.nowhere:1").stderr


def test_a_handler_is_called_until_it_is_taken_away() -> None:
    seen: list[str] = []
    fault_points.install(seen.append)
    fault_points.fault_point("save.renamed")
    fault_points.install(None)
    fault_points.fault_point("save.pruned")
    assert seen == ["save.renamed"]
    with pytest.raises(ValueError, match="no fault point"):
        fault_points.killer("save.nowhere")


def test_the_table_names_every_point() -> None:
    texts = "".join(s.text for s in shipped() if s.module != "mopd.fault_points")
    assert all(f'fault_point("{name}")' in texts for name in fault_points.FAULT_POINTS)
    assert texts.count("fault_point(") == len(fault_points.FAULT_POINTS)
