"""The command line: which rows, bench.json, a table."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench import (
    cases,
    data,
    measure,
    problems,
    rows,
    serve_cases,
    step_cases,
    transport_cases,
)

# JSON first: a heap that held large tensors makes both of its sides slower, ours more
TRANSPORT = {
    "transport_json": transport_cases.transport_json,
    "transport_rows": serve_cases.transport_rows,
    "serve_vllm": serve_cases.serve_vllm,
}
STEPS = {"packing": step_cases.packing}
ROWS = (*TRANSPORT, *STEPS, *rows.BUILDERS, "scaling", "alignment", "projection_build")
REPEATS = 7


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    measure.limit_threads()
    if options.peak:
        print(peak(*options.peak, quick=options.quick, cache=options.cache))
        return 0
    with tempfile.TemporaryDirectory(prefix="mopd-bench-") as temporary:
        cache = options.cache or Path(temporary)
        found = {name: run_row(name, options, cache) for name in options.rows}
    results = {name: row for name, row in found.items() if row is not None}
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--rows", type=_row_names, default=ROWS, help="comma-separated; all")
    parser.add_argument("--quick", action="store_true", help="small shapes, 1 repeat")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--no-peak", action="store_true", help="skip the peak memory")
    parser.add_argument("--cache", type=Path, help="where projections are kept; a new one")
    parser.add_argument("--peak", nargs=2, metavar=("ROW", "SIDE"), help="print one peak only")
    return parser


def _row_names(value: str) -> tuple[str, ...]:
    names = tuple(value.split(","))
    unknown = set(names) - set(ROWS)
    if unknown:
        raise argparse.ArgumentTypeError(f"no row {sorted(unknown)}; rows: {', '.join(ROWS)}")
    return names


def run_row(name: str, options: argparse.Namespace, cache: Path) -> dict[str, Any] | None:
    """One entry of bench.json; None: not possible here."""
    quick, repeats = options.quick, 1 if options.quick else options.repeats
    if name == "scaling":
        return scaling(quick, cache, repeats)
    if name == "alignment":
        return data.alignment(quick, cache, repeats)
    if name in TRANSPORT | STEPS:
        return (TRANSPORT | STEPS)[name](quick, repeats)
    if name == "projection_build":
        row = data.projection_build(quick, min(repeats, 3))
        if not options.no_peak:
            row["peak_bytes"] = measure.peak_in_fresh_process(
                name, "ours", quick=quick, cache=cache
            )
        return row
    row = measure.loss_row(case(name, quick, cache), repeats)
    if not options.no_peak:
        for key, side in (("peak_tensors", "ours"), ("baseline_peak_tensors", "baseline")):
            row[key] = measure.peak_in_fresh_process(name, side, quick=quick, cache=cache)
    return row


def case(name: str, quick: bool, cache: Path) -> cases.Case:
    shapes = rows.QUICK if quick else rows.FULL
    return rows.BUILDERS[name](shapes[name], cache)


def peak(row: str, side: str, *, quick: bool, cache: Path) -> float:
    """In units of the logits tensor; in bytes for the projection."""
    if row == "projection_build":
        student, teacher, _ = problems.vocabularies_of(data.SIZES[quick])
        return float(measure.extra_bytes(data.builder(student, teacher)))
    built = case(row, quick, cache)
    return measure.extra_bytes(built.side(side)) / built.tensor_bytes


def scaling(quick: bool, cache: Path, repeats: int) -> dict[str, Any]:
    """Exponents: CPU time goes with rows ** rows_exponent, vocabulary ** vocab_exponent."""
    exponents, total = {}, 0.0
    for name, build in rows.BUILDERS.items():
        base = rows.QUICK[name] if quick else rows.SCALING_BASE[name]
        shapes = {"base": base, "rows": base.scaled(rows=2), "vocab": base.scaled(vocab=2)}
        runs = {key: build(shape, cache).ours for key, shape in shapes.items()}
        seconds = measure.cpu_seconds(runs, repeats)
        total += sum(seconds.values())
        exponents[name] = {
            key: math.log2(seconds[key] / seconds["base"]) for key in ("rows", "vocab")
        }
    return {
        "ratio": None,
        "peak_tensors": None,
        "cpu_seconds": total,
        "repeats": repeats,
        "work": "every loss with its rows doubled, then its vocabularies",
        "baseline": None,
        "error": None,
        "exponents": exponents,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'row':<18}{'ratio':>8}{'peak':>8}{'CPU s':>9}{'error':>10}  notes"]
    for name, row in results.items():
        worst = max(row["error"].values()) if row["error"] else None
        cells = (
            _cell(row["ratio"], 8, ".2f")
            + _cell(row["peak_tensors"], 8, ".2f")
            + _cell(row["cpu_seconds"], 9, ".3f")
            + _cell(worst, 10, ".1e")
        )
        lines.append(f"{name:<18}{cells}  {_notes(row)}")
    return "\n".join(lines)


def _cell(value: float | None, width: int, form: str) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def _notes(row: dict[str, Any]) -> str:
    if "exponents" in row:
        parts = (f"{k} T^{e['rows']:.2f} V^{e['vocab']:.2f}" for k, e in row["exponents"].items())
        return ", ".join(parts)
    if "tokens_per_second" in row:
        return f"{row['tokens_per_second']:,.0f} tokens per CPU second"
    if row.get("peak_bytes") is not None:
        return f"peak {row['peak_bytes'] / 1e9:.2f} GB"
    notes = []
    if "bytes_per_token" in row:
        notes.append(f"{row['bytes_per_token']:,.0f} bytes a token")
    if "same_formula_ratio" in row:
        notes.append(f"{row['same_formula_ratio']:.2f} of the same formula in plain torch")
    if "truncation" in row:
        found = row["truncation"]
        parts = (found["mean_difference"], found["mean_bound"], found["max_bound"])
        notes.append("cut off {:.1e} a row, bound {:.1e} (at most {:.1e})".format(*parts))
    return ", ".join(notes)
