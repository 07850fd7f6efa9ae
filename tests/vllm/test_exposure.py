"""Which of vLLM's own paths a stranger gets at, by its real application without an engine."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from mopd.serving.vllm_command import OFFLINE, TOKEN_VARIABLE
from tests.helpers.runs import ROOT, environment
from tests.helpers.vllm_server import vllm_python

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# Prints [what, path, status] of every route for a client without a key at an address that is not
# the loopback: by vLLM's key alone, below mopd's middleware with a token, and without one.
SCRIPT = """
import asyncio, json, logging, os, sys

logging.disable(logging.CRITICAL)
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser


async def status(app, what, path):
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "websocket" if what == "websocket" else "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "method": what, "scheme": "http", "http_version": "1.1", "asgi": {"version": "3.0"},
        "headers": [(b"content-type", b"application/json")], "subprotocols": [],
        "server": ("10.0.0.1", 80), "client": ("10.0.0.9", 1), "state": {},
    }
    try:
        await asyncio.wait_for(app(scope, receive, send), 10)
    except Exception as error:  # it got as far as the engine, which is not there
        return type(error).__name__
    return sent[0].get("status", sent[0]["type"])


async def all_of(*words):
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "x", *words])
    app = build_app(args, ("generate",))
    found = []
    for route in app.routes:
        for what in sorted(getattr(route, "methods", None) or ["GET", "websocket"]):
            found.append([what, route.path, await status(app, what, route.path)])
    found.append(["OPTIONS", "/v1/completions", await status(app, "OPTIONS", "/v1/completions")])
    return found


async def three():
    words = ["--enable-scale-out"]
    own = await all_of(*words)
    words += ["--middleware", "mopd.serving.vllm_sampling.SampleMiddleware"]
    ours = await all_of(*words)
    del os.environ["MOPD_SERVE_TOKEN"]
    print("\\n" + json.dumps({"own": own, "ours": ours, "bare": await all_of(*words)}))


asyncio.run(three())
"""
TOKEN = "a-token-of-enough-length"


def test_nobody_gets_anywhere_without_the_token_but_to_the_health() -> None:
    keys = {"VLLM_API_KEY": TOKEN, TOKEN_VARIABLE: TOKEN, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(vllm_python()), "-c", SCRIPT],
        env=environment() | OFFLINE | keys,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[Any]] = json.loads(done.stdout.splitlines()[-1])
    for kind in ("ours", "bare"):
        let_in = {(what, path): said for what, path, said in found[kind] if said != 401}
        let_in.pop(("GET", "/health"))  # a KeyError where it is shut
        assert let_in == {("websocket", "/metrics"): "websocket.close"}
    # and this is what vLLM's own key leaves open
    open_paths = {path for _, path, status in found["own"] if status != 401}
    assert {"/tokenize", "/scale_elastic_ep", "/metrics"} <= open_paths
