"""What the tests of samplers on a made-up engine need."""

from __future__ import annotations

import pytest

from tests.helpers.sample_engine import make_up_params


@pytest.fixture
def made_up_params(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without vLLM there is no `SamplingParams`."""
    make_up_params(monkeypatch)
