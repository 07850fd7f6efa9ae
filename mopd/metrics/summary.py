"""What a run achieved, as a file and as a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mopd.metrics.text import json_safe, printable, replace_file
from mopd.metrics.thresholds import CANONICAL_LOSS


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainResult:
    """Greedy accuracies on the held-out rows of one domain; ``teacher`` is None if not measured.

    The canonical shares say how many answers are written in the tokenizer's own segmentation.
    """

    before: float
    after: float
    teacher: float | None = None
    canonical_before: float | None = None
    canonical_after: float | None = None

    @property
    def headroom_recovered(self) -> float | None:
        """Share of the distance to the teacher that was gained; None where there is no distance."""
        if self.teacher is None or not self.teacher > self.before:
            return None
        return (self.after - self.before) / (self.teacher - self.before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """``chunks``: per teacher, counts of chunks and of student tokens by chunk type.

    ``first_kl``: per teacher, nats between student and teacher in the first step;
    ``seconds``: wall time over all starts; ``learned`` None where nothing could be checked.
    ``evaluations``: each with its ``step`` and its metrics; ``best_step`` by `evaluate.metric`;
    ``stopped_early``: the step at which `evaluate.patience` ended the run.
    """

    steps: int
    seconds: float
    domains: Mapping[str, DomainResult]
    chunks: Mapping[str, Mapping[str, float]]
    answers: Mapping[str, Any] = field(default_factory=dict)  # issued, trained, dropped, in flight
    first_kl: Mapping[str, float] = field(default_factory=dict)
    learned: bool | None = None
    world: str | None = None
    evaluations: Sequence[Mapping[str, float]] = ()
    best_step: int | None = None
    stopped_early: int | None = None


def chunk_shares(counts: Mapping[str, float]) -> dict[str, float]:
    """``chunks <type>`` and ``tokens <type>`` counts -> shares of all chunks and of all tokens.

    ``tokens_outside_1_1`` counts only tokens that lie in some chunk.
    """
    shares: dict[str, float] = {}
    for what in ("chunks", "tokens"):
        mine = {key: value for key, value in counts.items() if key.startswith(f"{what} ")}
        total = sum(mine.values())
        shares |= {key: value / total if total else 0.0 for key, value in sorted(mine.items())}
    in_chunks = sum(shares.get(f"tokens {kind}", 0.0) for kind in ("1-1", "1-n", "n-1", "n-m"))
    one_to_one = shares.get("tokens 1-1", 0.0)
    shares["tokens_outside_1_1"] = 1.0 - one_to_one / in_chunks if in_chunks else 0.0
    return shares


def write_summary(path: Path, summary: Summary) -> None:
    """Write summary.json; a reader sees the old or the new file, never a part."""
    domains = {
        name: {**asdict(result), "headroom_recovered": result.headroom_recovered}
        for name, result in summary.domains.items()
    }
    content = json_safe(
        {
            "steps": summary.steps,
            "seconds": summary.seconds,
            "world": summary.world,
            "learned": summary.learned,
            "answers": summary.answers,
            "first_kl": summary.first_kl,
            "domains": domains,
            "evaluations": summary.evaluations,
            "best_step": summary.best_step,
            "stopped_early": summary.stopped_early,
            "chunks": {name: chunk_shares(counts) for name, counts in summary.chunks.items()},
            "chunks_of_all_teachers": chunk_shares(_added(summary.chunks.values())),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _added(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0.0) + value
    return total


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """Print the table of domains, then what each teacher's chunks look like, and the time."""
    console = console or Console()
    if summary.domains:
        console.print(_table(summary))
    else:
        console.print("held-out accuracy is not measured: no held-out row has an `answer`")
    for name, counts in summary.chunks.items():
        outside = chunk_shares(counts)["tokens_outside_1_1"]
        line = f"{name}: {outside:.0%} of the tokens lie in chunks other than 1-1"
        console.print(Text(printable(line)), soft_wrap=True)
    for line in _warnings(summary):
        console.print(Text(printable(line)), soft_wrap=True)
    if dropped := summary.answers.get("dropped"):
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        issued = summary.answers["issued"]
        console.print(Text(printable(f"{issued} answers, not trained on: {reasons}")))
    if summary.best_step is not None:
        console.print(f"best evaluation: after {summary.best_step} steps")
    if summary.stopped_early is not None:
        console.print(
            f"stopped early after {summary.stopped_early} steps: no better evaluation for "
            "evaluate.patience of them"
        )
    console.print(f"{summary.steps} steps in {summary.seconds:.0f} s")


def _table(summary: Summary) -> Table:
    table = Table()
    table.add_column("domain")
    for heading in ("before", "after", "teacher", "headroom recovered", "canonical"):
        table.add_column(heading, justify="right")
    for name, result in summary.domains.items():
        shares = (result.before, result.after, result.teacher, result.headroom_recovered)
        canonical = f"{_percent(result.canonical_before)} -> {_percent(result.canonical_after)}"
        table.add_row(Text(printable(name)), *map(_percent, shares), canonical)
    return table


def _warnings(summary: Summary) -> Iterator[str]:
    """A student that wins by writing its teacher's tokens has not learned in its own."""
    for name, result in summary.domains.items():
        before, after = result.canonical_before, result.canonical_after
        if before is not None and after is not None and after < before - CANONICAL_LOSS:
            yield (
                f"warning: {name}: the share of answers in the student's own segmentation fell "
                f"from {before:.0%} to {after:.0%}"
            )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
