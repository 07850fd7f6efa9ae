"""A plan as a picture: one box per node, one cell per device, a colour per owner."""

from __future__ import annotations

from html import escape

from mopd.cli.plan_text import occupants
from mopd.runtime.placement import Plan, Slot

CELL, LINE, GAP, PER_ROW, NARROWEST = 120, 18, 16, 8, 376
# Light fills that dark text can be read on; the student's first. They come again beyond eight.
COLOURS = ("#cfe2ff", "#d1e7dd", "#fff3cd", "#f8d7da", "#e2d9f3", "#d2f4ea", "#ffe5d0", "#e9ecef")
STYLE = "font-family: sans-serif; font-size: 12px; fill: #212529"


def picture_svg(plan: Plan, *, title: str) -> str:
    """A whole SVG document; text is escaped, and nothing outside the file is named."""
    devices, processors = occupants(plan, beside=False), occupants(plan, beside=True)
    owners = [name.rpartition(" ")[0] for names in devices.values() for name in names]
    colours = {owner: COLOURS[n % len(COLOURS)] for n, owner in enumerate(dict.fromkeys(owners))}
    per_row = min(PER_ROW, plan.num_devices_per_node)
    deepest = max(1, *(len(names) for names in devices.values()))
    height, shapes, top = LINE * (deepest + 1) + 6, [], 3 * LINE
    for node in range(plan.num_nodes):
        rows = -(-plan.num_devices_per_node // per_row)
        beside = [name for slot, some in processors.items() if slot.node == node for name in some]
        inner = rows * height + LINE * (2 if beside else 1)
        shapes.append(_box(GAP, top, max(per_row * CELL + 16, NARROWEST), inner + 14, "none"))
        shapes.append(_text(GAP + 8, top + LINE - 2, f"node {node}"))
        for index in range(plan.num_devices_per_node):
            row, column = divmod(index, per_row)
            x, y = GAP + 8 + column * CELL, top + LINE + 4 + row * height
            names = devices[Slot(node=node, index=index)]
            shapes += _device(x, y, height - 6, index, names, colours)
        if beside:
            said = f"on its processors: {', '.join(dict.fromkeys(beside))}"
            shapes.append(_text(GAP + 8, top + inner + 4, said))
        top += inner + 14 + GAP
    width = max(per_row * CELL + 16, NARROWEST) + 2 * GAP
    head = _text(GAP, 2 * LINE - 4, f"{title}: {plan.num_nodes} x {plan.num_devices_per_node}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" '
        f'viewBox="0 0 {width} {top}" style="{STYLE}">\n'
        f'<rect width="{width}" height="{top}" fill="#ffffff"/>\n{head}\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )


def _device(
    x: int, y: int, height: int, index: int, names: list[str], colours: dict[str, str]
) -> list[str]:
    shapes = [_text(x + 4, y + LINE - 4, str(index), colour="#6c757d")]
    for n, name in enumerate(names):
        fill = "#f8f9fa" if name.startswith("idle (") else colours[name.rpartition(" ")[0]]
        shapes.append(_box(x + 3, y + LINE + n * LINE - 1, CELL - 12, LINE - 2, fill, "none"))
        shapes.append(_text(x + 8, y + 2 * LINE + n * LINE - 6, _cut(name)))
    return [_box(x, y, CELL - 6, height, "#ffffff"), *shapes]


def _cut(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:10]}~{name[-5:]}"


def _box(x: int, y: int, width: int, height: int, fill: str, stroke: str = "#adb5bd") -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{fill}" '
        f'stroke="{stroke}"/>'
    )


def _text(x: int, y: int, text: str, *, colour: str = "#212529") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}">{escape(text)}</text>'
