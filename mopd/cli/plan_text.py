"""A plan as text: the cluster, a table of pools, a picture of the nodes, memory. 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise

from mopd.config.pools import STUDENT
from mopd.config.schema import RunConfig
from mopd.runtime.memory import ASSUMPTIONS, GB, Share
from mopd.runtime.placement import Plan, Pool, Slot

WIDTH = 100
PER_ROW = 8  # devices of a node beside each other
WIDEST_CELL, NARROWEST_CELL = 22, 10
# Kinds of memory with a column of their own; the rest is one column.
COLUMNS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "optim",
    "activations": "activ",
    "logits block": "logits",
    "KV cache": "cache",
}


def describe(
    config: RunConfig,
    plan: Plan,
    shares: Sequence[Share],
    *,
    problems: Sequence[str],
    notes: Sequence[str],
) -> str:
    """The whole text, without a newline at its end."""
    blocks = [_cluster(config, plan), "\n".join(_pools(config, plan)), "\n".join(_picture(plan))]
    if shares:
        blocks.append("\n".join(_memory(config, plan, shares)))
    said = [*(f"TOO LARGE: {line}" for line in problems), *(f"note: {line}" for line in notes)]
    if said:
        blocks.append("\n".join(_wrapped(line) for line in said))
    return "\n\n".join(blocks)


def _cluster(config: RunConfig, plan: Plan) -> str:
    memory = config.cluster.device_memory_gb
    nodes = "1 node" if plan.num_nodes == 1 else f"{plan.num_nodes} nodes"
    each = "" if memory is None else f" with {memory:g} GB"
    return f"{config.run.name}: {nodes} x {plan.num_devices_per_node} {plan.pools[0].device}{each}"


def _pools(config: RunConfig, plan: Plan) -> Iterator[str]:
    rows = [("pool", "kind", "devices", "shared", "who")]
    for pool in plan.pools:
        who = [_who(config, pool, owner) for owner in _owners(pool)]
        shared = "yes" if pool.shared else "no"
        rows.append((pool.name, pool.device, str(len(pool.slots)), shared, "; ".join(who)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        head = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        indent = " " * (len(head) + 2)
        yield textwrap.fill(
            row[4], WIDTH, initial_indent=f"{head}  ", subsequent_indent=indent
        ).rstrip()
    if plan.inside:
        yield _wrapped(f"in the student's processes: {', '.join(plan.inside)}")
    if plan.reached:
        yield _wrapped(f"at URLs: {', '.join(plan.reached)}")


def _owners(pool: Pool) -> list[str]:
    return list(dict.fromkeys(member.owner for member in pool.members))


def _who(config: RunConfig, pool: Pool, owner: str) -> str:
    members = [member for member in pool.members if member.owner == owner]
    if owner != STUDENT:
        width = len(members[0].slots)
        engines = "1 engine" if len(members) == 1 else f"{len(members)} engines"
        return f"{owner}: {engines}" + (f" of {width} devices" if width > 1 else "")
    parallel = config.student.parallel
    sizes = {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "cp": parallel.context_parallel_size,
    }
    replicas = len(members)
    for size in sizes.values():
        replicas //= size
    named = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    ranks = "1 rank" if len(members) == 1 else f"{len(members)} ranks"
    return f"student: {ranks} ({' x '.join([*named, f'dp {replicas}'])})"


def occupants(plan: Plan, *, beside: bool) -> dict[Slot, list[str]]:
    """Who sits on every slot of the student's kind of device; ``beside``: on processors beside
    them. An empty list is a device that nobody has, `idle` one that a pool has for nobody."""
    kind = plan.pools[0].device
    found: dict[Slot, list[str]] = {}
    if not beside:
        per_node = range(plan.num_devices_per_node)
        found = {Slot(node=n, index=i): [] for n in range(plan.num_nodes) for i in per_node}
    for pool in plan.pools:
        if (pool.device != kind) != beside:
            continue
        for slot in pool.slots:
            names = [_short(m.owner, m.number) for m in pool.members if slot in m.slots]
            found.setdefault(slot, []).extend(names or [f"idle ({pool.name})"])
    return found


def _short(owner: str, number: int) -> str:
    if owner == STUDENT:
        return f"rank {number}"
    return f"{owner.removeprefix('teachers.')} {number}"


def _picture(plan: Plan) -> Iterator[str]:
    devices, processors = occupants(plan, beside=False), occupants(plan, beside=True)
    per_row = min(PER_ROW, plan.num_devices_per_node)
    longest = max((len(name) for names in devices.values() for name in names), default=0)
    cell = min((WIDTH - 1) // per_row - 1, max(NARROWEST_CELL, longest + 2), WIDEST_CELL)
    for node in range(plan.num_nodes):
        for start in range(0, plan.num_devices_per_node, per_row):
            end = min(start + per_row, plan.num_devices_per_node)
            names = [devices[Slot(node=node, index=i)] for i in range(start, end)]
            title = f" node {node} " if start == 0 else ""
            line = "+".join("-" * cell for _ in names)
            yield f"+{title}{line[len(title) :]}+"
            yield _row([f"{i}" for i in range(start, end)], cell)
            for depth in range(max(1, *(len(some) for some in names))):
                row = [some[depth] if depth < len(some) else "" for some in names]
                if depth == 0:
                    row = [name or "-" for name in row]
                yield _row(row, cell)
        yield f"+{'+'.join('-' * cell for _ in names)}+"
        beside = [name for slot, some in processors.items() if slot.node == node for name in some]
        if beside:
            yield _wrapped(f"  on its processors: {', '.join(dict.fromkeys(beside))}")


def _row(names: Sequence[str], cell: int) -> str:
    shown = (f" {_cut(name, cell - 2)}".ljust(cell) for name in names)
    return f"|{'|'.join(shown)}|"


def _cut(name: str, width: int) -> str:
    """At most ``width`` characters, the number at its end included."""
    if len(name) <= width:
        return name
    head, _, number = name.rpartition(" ")
    return f"{head[: width - len(number) - 2]}~ {number}"


def _memory(config: RunConfig, plan: Plan, shares: Sequence[Share]) -> Iterator[str]:
    largest = max(share.total for share in shares)
    unit, scale = ("GB", GB) if largest >= GB else ("MB", GB // 1000)
    names = [f"{share.owner} {numbers(share.numbers)} ({share.what})" for share in shares]
    width = max(len(name) for name in names)
    titles = [*COLUMNS.values(), "other", "total"]
    memory, kind = config.cluster.device_memory_gb, plan.pools[0].device
    kinds = {pool.name: pool.device for pool in plan.pools}
    yield f"memory of one device, {unit}"
    yield "".ljust(width) + "".join(f"{title:>8}" for title in titles)
    for name, share in zip(names, shares, strict=True):
        values = [share.parts.get(key, 0) for key in COLUMNS]
        values += [share.total - sum(values), share.total]
        cells = "".join(f"{value / scale:8.2f}" if value else f"{'-':>8}" for value in values)
        over = memory is not None and share.total > memory * GB and kinds[share.pool] == kind
        yield f"{name.ljust(width)}{cells}{' !' if over else ''}"
    others = {key for share in shares for key in share.parts if key not in COLUMNS}
    if others:
        yield _wrapped(f"other: {', '.join(sorted(others))}")
    yield _wrapped(ASSUMPTIONS)


def numbers(some: Sequence[int]) -> str:
    """`0-3, 8` for 0, 1, 2, 3 and 8; `0, 4 .. 28` where a step is regular."""
    if len(some) > 2 and len({b - a for a, b in pairwise(some)}) == 1:
        step = some[1] - some[0]
        return f"{some[0]}-{some[-1]}" if step == 1 else f"{some[0]}, {some[1]} .. {some[-1]}"
    runs: list[list[int]] = []
    for number in some:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
