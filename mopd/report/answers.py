"""Samples of a run, as few as a page can carry."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mopd.report.read import Record

MAX_BYTES = 2_500_000  # of all samples of a page, as JSON


def kept_samples(samples: Sequence[Record], *, max_bytes: int = MAX_BYTES) -> list[Record]:
    """All samples, or those of fewer steps, evenly spread with the first and the last, until they
    fit; of one step alone the first ones of each domain."""
    by_step: dict[int, list[Record]] = {}
    for sample in samples:
        by_step.setdefault(sample["step"], []).append(sample)
    steps = sorted(by_step)
    sizes = {step: sum(map(_size, by_step[step])) for step in steps}
    while len(steps) > 2 and sum(sizes[step] for step in steps) > max_bytes:
        last = steps[-1]
        steps = [*steps[:-1:2], last]
    found = [sample for step in steps for sample in by_step[step]]
    while len(found) > 1 and sum(map(_size, found)) > max_bytes:
        found = _fewer(found)
    return found


def _fewer(samples: Sequence[Record]) -> list[Record]:
    """Without the longer half."""
    order = sorted(range(len(samples)), key=lambda i: _size(samples[i]))
    return [samples[i] for i in sorted(order[: len(samples) // 2])]


def _size(sample: Mapping[str, Any]) -> int:
    return len(json.dumps(sample))
