"""What an actor says just before its work ends."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.runs import ROOT

pytestmark = pytest.mark.ray

# In a process of its own, because ray reads its token when it is imported. The question is answered
# before the work is seen to have ended, and nobody has read the answer yet.
SCRIPT = """
import json, sys
import ray
from mopd.runtime.ray.cluster import join
from mopd.runtime.ray.watched import Watched

class Speaker:
    def __init__(self):
        self.lines = ["early"]
    def run(self):
        return 0
    def say(self, line):
        self.lines.append(line)
    def news(self):
        said, self.lines = self.lines, []
        return said

join(sys.argv[1])
actor = ray.remote(Speaker).options(num_cpus=0).remote()
watched = Watched("speaker", actor, pause_s=0.0, silent_s=60.0)
watched.begin(actor.run.remote())
assert watched.look() is None  # asks
ray.get(actor.say.remote("late"))
assert watched.result() == 0
print(json.dumps(watched.last_look(timeout_s=30.0)))
"""


def test_lines_of_a_question_under_way_are_not_lost(ray_address: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, ray_address],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["early"], ["late"]]
