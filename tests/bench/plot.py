"""``bench.json`` as a picture: time and memory of every loss beside the targets, as SVG."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from tests.bench.targets import TARGETS

_LABEL, _PANEL, _ROW, _TOP = 130, 330, 26, 56
OURS, PEER, GOAL = "#3b7dd8", "#b8bcc4", "#c0392b"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.plot", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=Path("bench.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.svg"))
    options = parser.parse_args(arguments)
    options.out.write_text(plot(json.loads(options.results.read_text())))
    print(f"wrote {options.out}")
    return 0


def plot(results: dict[str, dict[str, Any]]) -> str:
    """Two panels on logarithmic axes; rows that were not measured are left out."""
    rows = [name for name in TARGETS if results.get(name, {}).get("ratio") is not None]
    width, height = _LABEL + 2 * _PANEL + 40, _TOP + _ROW * len(rows) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *_legend(),
    ]
    panels = (
        ("CPU time, baseline = 1", "ratio", lambda t: (t.ratio, t.peer_ratio), (0.05, 20.0)),
        ("peak extra memory, logits tensors", "peak_tensors", lambda t: (t.peak, t.peer_peak),
         (0.1, 20.0)),
    )  # fmt: skip
    for number, (title, key, pick, span) in enumerate(panels):
        left = _LABEL + number * (_PANEL + 20)
        parts += _axis(left, title, span, height)
        for place, name in enumerate(rows):
            top = _TOP + _ROW * place
            if number == 0:
                parts.append(_text(_LABEL - 8, top + 14, name, anchor="end"))
            goal, peer = pick(TARGETS[name])
            parts += _bars(left, top, span, ours=results[name][key], goal=goal, peer=peer)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend() -> list[str]:
    marks = ((OURS, "mopd"), (PEER, "best peer, as reported"), (GOAL, "target"))
    found = []
    for place, (color, label) in enumerate(marks):
        x = _LABEL + (0, 70, 240)[place]
        found.append(f'<rect x="{x}" y="8" width="12" height="12" fill="{color}"/>')
        found.append(_text(x + 17, 18, label))
    return found


def _axis(left: int, title: str, span: tuple[float, float], height: int) -> list[str]:
    found = [_text(left, 40, title, weight="bold")]
    tick = span[0]
    while tick <= span[1] * 1.001:
        x = left + _place(tick, span)
        found.append(
            f'<line x1="{x:.1f}" y1="{_TOP - 8}" x2="{x:.1f}" y2="{height - 26}" stroke="#e3e5e8"/>'
        )
        found.append(_text(x, height - 10, f"{tick:g}", anchor="middle"))
        tick *= 10 ** (1 / 3) if span[1] / span[0] < 10 else 10**0.5
        tick = float(f"{tick:.1g}")
    return found


def _bars(
    left: int,
    top: int,
    span: tuple[float, float],
    *,
    ours: float | None,
    goal: float,
    peer: float | None,
) -> list[str]:
    found = []
    if peer is not None:
        found.append(_bar(left, top + 13, _place(peer, span), 6, PEER))
    if ours is not None:
        found.append(_bar(left, top + 2, _place(ours, span), 10, OURS))
        beside = left + _place(max(ours, goal), span) + 5
        found.append(_text(beside, top + 11, f"{ours:.2f}", size=10))
    x = left + _place(goal, span)
    found.append(
        f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + 21}" stroke="{GOAL}" '
        'stroke-width="2"/>'
    )
    return found


def _bar(x: float, y: float, width: float, height: float, color: str) -> str:
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" fill="{color}"/>'


def _place(value: float, span: tuple[float, float]) -> float:
    low, high = map(math.log, span)
    share = (math.log(max(value, span[0])) - low) / (high - low)
    return (_PANEL - 40) * min(share, 1.0)


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown lines for docs/benchmarks.md."""
    lines = ["| row | ratio | peak | error | target: ratio (peak) |", "|---|---|---|---|---|"]
    for name, target in TARGETS.items():
        row: dict[str, Any] = results.get(name) or {}
        if row.get("ratio") is None:
            continue
        worst = max(row["error"].values())
        peak = row["peak_tensors"]
        lines.append(
            f"| `{name}` | {_met(row['ratio'], target.ratio)} | {_met(peak, target.peak)} | "
            f"{worst:.0e} | {target.ratio:.2f} ({target.peak:g}) |"
        )
    return "\n".join(lines)


def _met(value: float | None, goal: float) -> str:
    if value is None:
        return "-"
    return f"**{value:.2f}**" if value <= goal else f"{value:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
