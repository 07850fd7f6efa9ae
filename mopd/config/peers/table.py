"""A trainer's keys beside ours, as a table for documents."""

from __future__ import annotations

from typing import Any

from mopd.config.peers.rows import UNSET, Peer, Row

DEPENDS = "it depends"


def key_table(peer: Peer) -> str:
    """Markdown: their key, their default, ours, and what differs; without keys that are dropped."""
    lines = [f"| {peer.title} | default | mopd | mind |", "|---|---|---|---|"]
    for row in key_rows(peer):
        default = f"`{row['default']}`" if row["default"] not in ("", DEPENDS) else row["default"]
        ours = ", ".join(f"`{place}`" for place in row["mopd"])
        lines.append(f"| `{row['key']}` | {default} | {ours} | {row['mind']} |")
    return "\n".join(lines) + "\n"


def key_rows(peer: Peer) -> list[dict[str, Any]]:
    """The same for programs: ``key``, ``default``, ``mopd`` (a list of keys) and ``mind``."""
    found: list[dict[str, Any]] = []
    for key in dict.fromkeys(row.key for row in peer.rows):
        rows = [row for row in peer.rows if row.key == key]
        places = list(dict.fromkeys(row.place for row in rows if row.target is not None))
        if places:
            notes = "; ".join(dict.fromkeys(row.note for row in rows if row.target and row.note))
            found.append({"key": key, "default": _default(rows), "mopd": places, "mind": notes})
    return found


def _default(rows: list[Row]) -> str:
    defaults = [row.default for row in rows if row.default is not UNSET]
    if not defaults or defaults[0] is None:
        return ""
    return DEPENDS if callable(defaults[0]) else _shown(defaults[0])


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
