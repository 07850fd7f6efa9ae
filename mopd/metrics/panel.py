"""The live panel of a run, from what `mopd.metrics.progress` knows. Pure: state in, rich out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from mopd.metrics.progress import Progress, percents
from mopd.metrics.text import printable

NARROWEST = 50  # columns; below, plain lines say more
SIDE_BY_SIDE = 92  # columns from which teachers and domains stand beside each other
MAX_ROWS, MIN_ROWS = 12, 3  # of teachers, and of domains
GAP = 4  # columns between them
SHORTEST_HISTORY, LONGEST_HISTORY = 8, 24
_NUMBERS = re.compile(r"(\d+)")
COLORS = {
    "rollout": "dodger_blue2",
    "teachers": "medium_purple1",
    "align": "dark_cyan",
    "train": "green3",
    "sync": "gold3",
    "wait": "indian_red",
    "other": "grey50",
}
# What tells neighbours in the bar apart: colours, else shades.
SHADES, ASCII_SHADES = "█░▓▒", "#-=+"
SPARKS, ASCII_SPARKS = "▁▂▃▄▅▆▇█", "_.-=+*#@"


class RunPanel:
    """Renders ``progress`` as it is at that moment, as wide and as high as the terminal allows."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self._progress.lock:
            panel = _Layout(self._progress, console, options).panel()
        yield panel


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """``history`` draws as many columns as it is given."""

    value: str
    history: Callable[[int], Text]
    more: str = ""


_Heads = Sequence[str]
_Cells = Mapping[str, _Row]


class _Layout:
    def __init__(self, progress: Progress, console: Console, options: ConsoleOptions) -> None:
        self._progress = progress
        self._width = options.max_width - 4  # the frame and its padding
        self._height = console.height
        self._is_ascii = options.ascii_only
        self._has_colors = console.color_system is not None and not console.no_color

    def panel(self) -> Panel:
        parts: list[RenderableType] = [self._bar(), self._headline()]
        tables = self._tables()
        if tables is not None:
            parts += ["", tables]
        parts += self._times()
        if self._progress.activity is not None:
            parts += [self._activity()]
        progress = self._progress
        return Panel(
            Group(*parts),
            box=box.ROUNDED,
            border_style="grey50",
            title=Text(printable(progress.title), style="bold") if progress.title else None,
            title_align="left",
            padding=(0, 1),
            width=self._width + 4,
        )

    def _bar(self) -> Table:
        progress = self._progress
        left = progress.seconds_left
        words = f"{progress.done}/{progress.num_steps}  {_share(progress)}"
        times = f"{_clock(progress.seconds)} gone  {_clock(left)} left"
        grid = Table.grid(Column(ratio=1), Column(no_wrap=True), padding=(0, 2), expand=True)
        bar = ProgressBar(
            total=max(progress.num_steps, 1),
            completed=progress.done,
            complete_style="green3",
            finished_style="green3",
        )
        grid.add_row(bar, Text.assemble((words, "bold"), "  ", (times, "grey62")))
        return grid

    def _headline(self) -> Table:
        latest = self._progress.latest
        shown = [
            ("loss", "loss", "{:.4f}"),
            ("accuracy", "accuracy", "{:.1%}"),
            ("tokens_per_second", "tokens/s", "{:,.0f}"),
            ("grad_norm", "grad norm", "{:.3g}"),
            ("lr", "lr", "{:.2g}"),
        ]
        texts = []
        for key, label, style in shown:
            if key in latest:
                text = Text.assemble((f"{label} ", "grey62"), (style.format(latest[key]), "bold"))
                if key == "loss" and self._width >= 70:
                    text.append_text(Text(" ").append_text(self._spark("loss", 16, "cyan")))
                texts.append(text)
        while sum(text.cell_len + 3 for text in texts) - 3 > self._width and len(texts) > 2:
            texts.pop()
        grid = Table.grid(*(Column(no_wrap=True) for _ in texts), padding=(0, 3, 0, 0))
        grid.add_row(*(texts or [Text("the first step has not ended yet", style="grey62")]))
        return grid

    def _tables(self) -> RenderableType | None:
        """Teachers and domains, beside each other where there is room."""
        contents = [found for found in (self._teachers(), self._domains()) if found[1]]
        if not contents:
            return None
        beside = self._width >= SIDE_BY_SIDE and len(contents) > 1
        # beside them: the frame, the bar, the headline, the times, what is going on, free lines
        rows = (self._height - 11) // (1 if beside else len(contents)) - 1
        rows = max(MIN_ROWS, min(MAX_ROWS, rows))
        width = (self._width - GAP) // 2 if beside else self._width
        tables = [_table(heads, cells, rows, width) for heads, cells in contents]
        if not beside:
            return Group(*tables)
        grid = Table.grid(*(Column(width=width) for _ in tables), padding=(0, GAP, 0, 0))
        grid.add_row(*tables)
        return grid

    def _teachers(self) -> tuple[_Heads, _Cells]:
        """By divergence, or by loss where a loss has none."""
        latest = self._progress.latest
        kind = "kl" if any(key.startswith("kl/") for key in latest) else "loss"
        names = (key.removeprefix(f"{kind}/") for key in latest if key.startswith(f"{kind}/"))
        cells = {
            name: _Row(
                value=f"{latest[f'{kind}/{name}']:.4f}",
                history=self._history(f"{kind}/{name}", "medium_purple1"),
            )
            for name in sorted(names, key=_natural)
        }
        return ("teacher", "KL" if kind == "kl" else "loss"), cells

    def _domains(self) -> tuple[_Heads, _Cells]:
        latest, heldout = self._progress.latest, self._progress.heldout
        prefix = "accuracy/"
        names = {key[len(prefix) :] for key in latest if key.startswith(prefix)} | set(heldout)
        cells = {
            name: _Row(
                value=f"{latest[prefix + name]:.1%}" if prefix + name in latest else "",
                history=self._history(prefix + name, "dodger_blue2"),
                more=f"{heldout[name]:.1%}" if name in heldout else "",
            )
            for name in sorted(names, key=_natural)
        }
        heads = ("domain", "rollouts")
        if heldout:
            heads += (f"held-out @{self._progress.heldout_step}",)
        return heads, cells

    def _history(self, key: str, color: str) -> Callable[[int], Text]:
        return lambda width: self._spark(key, width, color)

    def _spark(self, key: str, width: int, color: str) -> Text:
        series = self._progress.series.get(key)
        points = series.points(width) if series is not None else []
        if len(points) < 2:
            return Text("")
        low, high = (0.0, 1.0) if key.startswith("accuracy") else (min(points), max(points))
        marks = ASCII_SPARKS if self._is_ascii else SPARKS
        scale = (len(marks) - 1) / ((high - low) or 1.0)
        levels = (round((min(max(p, low), high) - low) * scale) for p in points)
        return Text("".join(marks[level] for level in levels), style=color)

    def _times(self) -> list[RenderableType]:
        """The bar of a step's phases, and what each of them is."""
        times = self._progress.step_times
        total = sum(times.values())
        if total <= 0:
            return []
        shares = dict(zip(times, percents(list(times.values())), strict=True))
        shown = {name: share for name, share in shares.items() if share > 0}
        marks = dict(zip(shown, self._marks(), strict=False))
        bar = Text(no_wrap=True)
        widths = _widths([times[name] for name in shown], self._width)
        for (name, mark), width in zip(marks.items(), widths, strict=True):
            bar.append(mark * width, style=COLORS[name])
        seconds = f"{total:.2f} s" if total >= 0.1 else f"{total * 1e3:.0f} ms"
        legend = [Text.assemble(("a step ", "grey62"), (seconds, "bold"))]
        legend += [
            Text.assemble((marks[name], COLORS[name]), f" {name} {share}%")
            for name, share in shown.items()
        ]
        return ["", bar, *_filled_lines(legend, self._width)]

    def _marks(self) -> str:
        """What the parts of the bar are made of: neighbours differ by colour, else by shade."""
        if self._has_colors and not self._is_ascii:
            return SHADES[0] * len(COLORS)
        return (ASCII_SHADES if self._is_ascii else SHADES) * 2

    def _activity(self) -> Text:
        now = self._progress.activity
        assert now is not None
        said = f"{now.what}: {now.done}/{now.total} {now.unit}"
        return Text(printable(said), style="gold3", overflow="ellipsis", no_wrap=True)


def _table(heads: _Heads, cells: _Cells, rows: int, width: int) -> Table:
    """A row per name, at most ``rows``, within ``width`` columns: the name, a value, its history,
    and another value where there is one."""
    name_width = min(30, max(12, width // 3))
    value_width = max(9, len(heads[1]))
    gaps = 2 * (len(heads) + 1)
    rest = width - name_width - value_width - gaps
    more_width = 0
    if len(heads) > 2:
        fits = rest - len(heads[2]) >= SHORTEST_HISTORY
        heads = heads if fits else (*heads[:2], heads[2].split()[0])
        more_width = len(heads[2])
    spark = min(LONGEST_HISTORY, max(0, rest - more_width))
    table = Table(
        Column(heads[0], width=name_width, no_wrap=True, overflow="ellipsis"),
        Column(heads[1], justify="right", width=value_width, no_wrap=True),
        Column("", width=spark, no_wrap=True),
        *(Column(head, justify="right", width=more_width, no_wrap=True) for head in heads[2:]),
        box=None,
        padding=(0, 2, 0, 0),
        header_style="grey62",
    )
    kept = list(cells) if len(cells) <= rows else list(cells)[: rows - 1]
    for name in kept:
        row = cells[name]
        values = [Text(row.value, style="bold"), row.history(spark)]
        values += [Text(row.more, style="bold green3") for _ in heads[2:]]
        table.add_row(Text(printable(name)), *values)
    if len(kept) < len(cells):
        table.add_row(Text(f"and {len(cells) - len(kept)} more", style="grey62"))
    return table


def _natural(name: str) -> list[tuple[int, str]]:
    """For sorting: numbers within a name by their value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _NUMBERS.split(name)]


def _filled_lines(items: Sequence[Text], width: int) -> list[Text]:
    """Items beside each other, none of them broken."""
    lines: list[Text] = []
    for item in items:
        if lines and lines[-1].cell_len + 2 + item.cell_len <= width:
            lines[-1] = Text("  ").join([lines[-1], item])
        else:
            lines.append(item)
    return lines


def _widths(values: Sequence[float], width: int) -> list[int]:
    """Columns of a bar, ``width`` together, at least one each."""
    total, edge, found = sum(values), 0.0, []
    for value in values:
        begin = round(edge)
        edge += value / total * (width - len(values))
        found.append(round(edge) - begin + 1)
    return found


def _share(progress: Progress) -> str:
    return f"{progress.done / max(progress.num_steps, 1):.0%}"


def _clock(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))
