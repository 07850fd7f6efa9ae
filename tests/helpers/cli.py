"""The command inside a rank of `tests.helpers.dist`, where torch is loaded already."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

from tests.helpers.dist import run_ranks

JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def mopd(*words: object, timeout: float = 120.0) -> Said:
    """``mopd`` with these words, as a user starts it: no job around it."""
    (said,) = run_ranks(_here, 1, [str(word) for word in words], timeout=timeout)
    return said


def _here(words: Sequence[str]) -> Said:
    from mopd.cli.main import main

    for name in JOB:
        os.environ.pop(name, None)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Said(code=code, out=out.getvalue(), err=err.getvalue())
