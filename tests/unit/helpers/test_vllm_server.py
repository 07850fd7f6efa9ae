"""Where vLLM is missing its tests skip, and CI fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.vllm_server import vllm_python


@pytest.mark.parametrize("in_ci", [True, False])
def test_a_missing_server_skips_or_fails_in_ci(
    in_ci: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.helpers.vllm_server.VENV", tmp_path)
    monkeypatch.setitem(os.environ, "CI", "true" if in_ci else "")
    with pytest.raises(pytest.fail.Exception if in_ci else pytest.skip.Exception, match="setup"):
        vllm_python()
