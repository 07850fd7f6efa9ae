"""What a test does where something outside the repository is missing."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

from mopd.environment import flag


def missing(reason: str) -> NoReturn:
    """Skip with the reason; fail where `CI` is on, which promises that everything is there."""
    if flag("CI", os.environ):
        pytest.fail(reason)
    pytest.skip(reason)
