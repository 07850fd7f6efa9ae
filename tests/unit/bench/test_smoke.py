"""The benchmark harness on small shapes: what it writes and that its rows are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.bench import measure
from tests.bench.command import ROWS, main

KEYS = {"ratio", "peak_tensors", "cpu_seconds", "repeats", "work", "baseline", "error"}


def test_quick_run_writes_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert main(["--quick", "--no-peak", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert tuple(results) == tuple(name for name in ROWS if name != "serve_vllm")
    shown = capsys.readouterr().out
    for name, row in results.items():
        assert name in shown
        assert set(row) >= KEYS
        assert row["cpu_seconds"] > 0
        assert all(part < 1e-4 for part in (row["error"] or {}).values()), (name, row["error"])


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_counts_at_least_the_gradient(tmp_path: Path) -> None:
    side = "baseline"
    assert measure.peak_in_fresh_process("topk_tail", side, quick=True, cache=tmp_path) >= 1.0


def test_an_unknown_row_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--rows", "nothing"])
    assert "forward_kl_full" in capsys.readouterr().err
