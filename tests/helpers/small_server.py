"""A server that starts in a moment, in place of vLLM: its launcher does not care what it starts."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.runs import ROOT

# Run with vLLM's words. Tells of each start in a line of the file that its own path names, brings
# a process along as vLLM brings its engine, and serves /health; `--fail TEXT` and `--slow` do not.
SCRIPT = """#!{python}
import http.server, json, os, subprocess, sys, time

words = sys.argv[1:]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
with open(__file__ + ".starts", "a") as file:
    told = {{"pid": os.getpid(), "child": child.pid, "words": words, "env": dict(os.environ)}}
    file.write(json.dumps(told) + "\\n")
if "--fail" in words:
    print("(APIServer pid=7) ERROR 11-22 06:12:38 [core.py:1] ValueError: too", "large")
    print("usage: nothing that helps [--level {{error,info}}]", flush=True)
    sys.exit(3)
if "--slow" in words:
    time.sleep(120)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


port = int(words[words.index("--port") + 1])
host = words[words.index("--host") + 1] if "--host" in words else "127.0.0.1"
http.server.ThreadingHTTPServer((host, port), Handler).serve_forever()
"""

# The same with scores: the stub server around the model that the words name. The first one gives no
# more answers once the file that `holds` names has a line.
TEACHER = """#!{python}
import asyncio, json, os, sys, time

sys.path.insert(0, {root!r})
words = sys.argv[1:]
is_first = not os.path.exists(__file__ + ".starts")
with open(__file__ + ".starts", "a") as file:
    file.write(json.dumps({{"pid": os.getpid(), "child": os.getpid(), "words": words}}) + "\\n")

from mopd.tokens.chat import ChatTokenizer
from tests.helpers.stub_scorers import ModelScorer
from tests.helpers.stub_server import StubOptions, StubServer

model = words[words.index("--model") + 1]
size = ChatTokenizer.load(model).vocabulary.size
port = int(words[words.index("--port") + 1])


async def no_answer(writer, reply):
    await asyncio.sleep(300)
    return False


def fault(number, request):
    if not is_first or not os.path.exists(__file__ + ".holds"):
        return None
    with open(__file__ + ".holds") as file:
        named = file.read()
    return no_answer if os.path.exists(named) and os.path.getsize(named) else None


options = StubOptions(key=os.environ["VLLM_API_KEY"], fault=fault)
host = words[words.index("--host") + 1]
with StubServer(ModelScorer(model, vocab_size=size), options, host=host, port=port):
    time.sleep(300)
"""

# A real engine: `mopd serve` around transformers, with vLLM's words.
SERVE = """#!{python}
import json, os, sys

sys.path.insert(0, {root!r})
words = sys.argv[1:]
with open(__file__ + ".starts", "a") as file:
    told = {{"pid": os.getpid(), "child": os.getpid(), "words": words, "env": dict(os.environ)}}
    file.write(json.dumps(told) + "\\n")
from mopd.cli.main import main

given = [word for name in ("--model", "--port") for word in (name, words[words.index(name) + 1])]
sys.exit(main(["serve", "--token-env", "MOPD_SERVE_TOKEN", *given]))
"""


def small_server(directory: Path, *, script: str = SCRIPT) -> Path:
    """What takes an interpreter's place in a recipe."""
    path = directory / "python-with-vllm"
    path.write_text(script.format(python=sys.executable, root=str(ROOT)))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def holds(server: Path, file: Path) -> None:
    """A run that writes to ``file`` waits for the server from its first line on: no pause of the
    test outlasts it."""
    Path(f"{server}.holds").write_text(str(file))


def starts(server: Path) -> list[dict[str, Any]]:
    """One for each start so far: pid, child, words, env."""
    path = Path(f"{server}.starts")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # without an end it is still being written
    return [json.loads(line) for line in lines if line.endswith("\n")]


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(what: Any, *, seconds: float = 20.0) -> None:
    """Waits for a condition without arguments to hold."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def left_over(server: Path) -> list[int]:
    """Processes of this server that still run."""
    return [one[key] for one in starts(server) for key in ("pid", "child") if not is_gone(one[key])]


def kill_group(pid: int) -> None:
    os.killpg(os.getpgid(pid), 9)
