"""A trainer's keys beside ours, as a table for documents."""

from __future__ import annotations

from mopd.config.peers.rows import UNSET, Peer, Row


def key_table(peer: Peer) -> str:
    """Markdown: their key, their default, ours, and what differs; without keys that are dropped."""
    lines = [f"| {peer.title} | default | mopd | mind |", "|---|---|---|---|"]
    for key in dict.fromkeys(row.key for row in peer.rows):
        rows = [row for row in peer.rows if row.key == key]
        places = list(dict.fromkeys(row.place for row in rows if row.target is not None))
        if not places:
            continue
        ours = ", ".join(f"`{place}`" for place in places)
        notes = "; ".join(dict.fromkeys(row.note for row in rows if row.target and row.note))
        lines.append(f"| `{key}` | {_default(rows)} | {ours} | {notes} |")
    return "\n".join(lines) + "\n"


def _default(rows: list[Row]) -> str:
    defaults = [row.default for row in rows if row.default is not UNSET]
    if not defaults or defaults[0] is None:
        return ""
    return "it depends" if callable(defaults[0]) else f"`{_shown(defaults[0])}`"


def _shown(value: object) -> str:
    return (
        {True: "true", False: "false"}.get(value, str(value))
        if isinstance(value, bool)
        else str(value)
    )
