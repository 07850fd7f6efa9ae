"""`mopd serve --model DIR`: scoring and sampling endpoints, around transformers or vLLM."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mopd.cli.words import Parser
from mopd.errors import ConfigError
from mopd.serving.scoring import check_exposure


def run(words: Sequence[str]) -> int:
    """Serves until it is interrupted. With vLLM this process becomes vLLM's server."""
    options = parser().parse_args(words)
    token = _token(options.token_env)
    check_exposure(options.host, token=token)
    if not options.model.is_dir():
        raise ConfigError(f"--model {options.model}: no such directory")
    if options.engine == "vllm":
        return _become_vllm(options, token=token)

    # After parsing: these bring torch in.
    import torch

    from mopd.serving.hf_server import open_server
    from mopd.serving.lease import lease_of

    with open_server(
        options.model,
        host=options.host,
        port=options.port,
        token=token,
        device=torch.device(options.device),
        samples=options.sample,
        scores=options.score or not options.sample,
        lease=lease_of(os.environ),
    ) as server:
        print(f"mopd serve: {options.model} at {server.url}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


def parser() -> argparse.ArgumentParser:
    found = Parser(
        prog="mopd serve",
        description="Score token ids for mopd's teachers, or sample for its students.",
    )
    found.add_argument("--model", type=Path, required=True, help="a local directory")
    found.add_argument("--engine", choices=("hf", "vllm"), default="hf")
    found.add_argument("--score", action="store_true", help="the default, without --sample")
    found.add_argument(
        "--sample", action="store_true", help="sample and take a student's weights instead"
    )
    found.add_argument("--host", default="127.0.0.1")
    found.add_argument("--port", type=int, default=8900)
    found.add_argument("--device", default="cpu", help="of --engine hf")
    found.add_argument("--token-env", metavar="NAME", help="variable that holds the token")
    found.add_argument(
        "vllm", nargs="*", help="after `--`: more words for vLLM's server (--engine vllm)"
    )
    return found


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not (token := os.environ.get(variable)):
        raise ConfigError(f"--token-env {variable}: the variable is not set")
    return token


def _become_vllm(options: argparse.Namespace, *, token: str | None) -> int:
    from mopd.serving.lease import LEASE_VARIABLE
    from mopd.serving.vllm_command import (
        LEASED_MODULE,
        MODULE,
        server_environment,
        server_words,
    )

    words = server_words(
        options.model,
        host=options.host,
        port=options.port,
        more=options.vllm,
        scoring=True,
        sampling=options.sample,
        module=LEASED_MODULE if os.environ.get(LEASE_VARIABLE) else MODULE,
    )
    environment = server_environment(os.environ, token=token)
    os.execve(sys.executable, [sys.executable, *words], environment)
