"""CPU time, peak memory and error of one case."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.bench.cases import Case, Run

THREADS = 2
ROOT = Path(__file__).resolve().parents[2]


def cpu_seconds(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of all threads per run; the runs take turns, one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            gc.collect()
            begin = time.process_time()
            run()
            spent = time.process_time() - begin
            if turn:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


def error(ours: Run, reference: Run) -> dict[str, float]:
    """Relative error of the value; largest error of the gradient over its largest entry."""
    value, gradient = ours()
    true_value, true_gradient = reference()
    scale = true_gradient.abs().max()
    return {
        "value": float((value - true_value).abs() / true_value.abs().clamp_min(1e-9)),
        "gradient": float((gradient - true_gradient).abs().max() / scale),
    }


def loss_row(case: Case, repeats: int) -> dict[str, Any]:
    """Everything but the peak."""
    runs: dict[str, Run] = {"ours": case.ours, "baseline": case.baseline}
    if case.same_formula is not None:
        runs["same_formula"] = case.same_formula
    seconds = cpu_seconds(runs, repeats)
    row = {
        "ratio": seconds["ours"] / seconds["baseline"],
        "peak_tensors": None,
        "cpu_seconds": seconds["ours"],
        "repeats": repeats,
        "work": case.work,
        "baseline": case.baseline_name,
        "error": error(case.ours, case.reference),
        "baseline_cpu_seconds": seconds["baseline"],
    }
    if "same_formula" in seconds:
        row["same_formula_ratio"] = seconds["ours"] / seconds["same_formula"]
    if case.truncation is not None:
        row["truncation"] = case.truncation()
    return row


def extra_bytes(run: Callable[[], Any]) -> int:
    """Growth of this process's resident memory at its highest while ``run`` works (Linux).

    The kernel keeps the high-water mark; the first call pays for what is set up only once.
    """
    run()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # peak := present
    before = _status("VmRSS")
    kept = run()
    peak = _status("VmHWM")
    del kept
    return peak - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def peak_in_fresh_process(row: str, side: str, *, quick: bool, cache: Path) -> float:
    """What ``python -m tests.bench --peak ROW SIDE`` prints."""
    words = [sys.executable, "-m", "tests.bench", "--peak", row, side, "--cache", str(cache)]
    # arrays of 64 KiB and more go back to the kernel when they are freed
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        words + ["--quick"] * quick,
        cwd=ROOT,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(done.stdout)


def limit_threads() -> None:
    torch.set_num_threads(THREADS)
