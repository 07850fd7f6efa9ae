"""A rank says how it ended, though torchrun tells it to end just then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mopd.demo import World
from tests.helpers.runs import ROOT, environment, words

# What a failed step leaves behind is freed once its error was looked at, when the session has
# closed everything: SIGTERM comes in this very moment.
ENDS = """
import os, signal, sys
import mopd.runtime.session
from mopd.errors import Stopped

class Freed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

def train(run, sink):
    freed = Freed()
    raise {error}

mopd.runtime.session.train = train
sys.path.insert(0, "launch")
from train import main

sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        ('RuntimeError("[gloo/pair.cc:1] Connection closed by peer")', 1, "error: rank 0: another"),
        ('Stopped("SIGTERM: ended after step 3")', 143, "SIGTERM: ended after step 3"),
    ],
)
def test_a_rank_tells_its_end_first(
    tiny_world: World, tmp_path: Path, error: str, code: int, told: str
) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-c", ENDS.format(error=error)),
            *("recipe=mopd_ctkd", *words(tiny_world, tmp_path, "told")),
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout + done.stderr).splitlines()[-1].startswith(told), done
    assert done.returncode == code
