"""Every ending of a run: its exit code and what it tells."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from mopd.errors import (
    ArtifactError,
    ConfigError,
    DidNotLearnError,
    MopdError,
    Stopped,
    TeacherExhausted,
)
from mopd.runtime.exits import Ending, ending_of

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]"
AGAIN = "the same command continues"

ENDINGS: dict[str, tuple[BaseException | None, Ending]] = {
    "well": (None, Ending(code=0)),
    "a mistake in the recipe": (
        ConfigError("train.steps: is 0"),
        Ending(code=2, message="error: train.steps: is 0"),
    ),
    "nothing was learned": (
        DidNotLearnError("sort: 0.1"),
        Ending(code=1, message="error: sort: 0.1"),
    ),
    "Ctrl-C": (
        KeyboardInterrupt(),
        Ending(
            code=130,
            message="interrupted: the same command continues from the last checkpoint",
            is_error=False,
        ),
    ),
    "SIGTERM": (Stopped("saved"), Ending(code=143, message=f"saved; {AGAIN}", is_error=False)),
    "a teacher stays away": (
        TeacherExhausted("math", "no answer"),
        Ending(code=1, message="error: teachers.math: no answer", everywhere=True),
    ),
    "a damaged file": (
        ArtifactError("journal"),
        Ending(code=1, message="error: journal", everywhere=True),
    ),
    "any other error of mopd's": (
        MopdError("x"),
        Ending(code=1, message="error: x", everywhere=True),
    ),
    "another rank ended": (
        RuntimeError(GLOO),
        Ending(code=1, message=GLOO, everywhere=True, is_lost=True),
    ),
    "another rank is out of reach": (
        dist.DistNetworkError("no route"),
        Ending(code=1, message="no route", everywhere=True, is_lost=True),
    ),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_an_ending(case: str) -> None:
    error, expected = ENDINGS[case]

    def work() -> None:
        if error is not None:
            raise error

    assert ending_of(work) == expected


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes differ"),
        ValueError("x"),
        KeyError("x"),
        AssertionError(),
        SystemExit(3),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_mistake_of_ours_is_no_ending(error: BaseException) -> None:
    def work() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        ending_of(work)
    assert raised.value is error
