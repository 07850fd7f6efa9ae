"""What W&B wrote offline: its records, read from the file that `wandb sync` would send.

The file is a LevelDB log: a header of 7 bytes, then blocks of 32 KiB with records, each a checksum
(4 bytes), a length (2), a kind (1: whole, 2 to 4: the first, a middle and the last part) and data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, FILE_HEADER, HEADER = 32768, 7, 7
WHOLE, LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """The `Record` messages of a ``run-<id>.wandb``."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # protobuf makes its classes at run time

    content, position, parts = path.read_bytes(), FILE_HEADER, b""
    assert content[:4] == b":W&B"
    while position + HEADER <= len(content):
        if BLOCK - position % BLOCK < HEADER:  # what is left of a block holds no header
            position += BLOCK - position % BLOCK
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]
        parts += content[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (WHOLE, LAST):
            record: Any = messages.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def offline_files(run: Path) -> list[Path]:
    """Of each start of a run, the oldest first."""
    return sorted((run / "wandb").glob("offline-run-*/*.wandb"))


def history(path: Path) -> list[dict[str, Any]]:
    """The rows of ``path``, without the keys that W&B adds, but for `_step`."""
    rows = [
        {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
    ]
    added = ("_runtime", "_timestamp", "_wandb")
    return [{key: value for key, value in row.items() if key not in added} for row in rows]


def about(path: Path) -> dict[str, Any]:
    """Project, name, id and config of the run."""
    run = next(r.run for r in records(path) if r.WhichOneof("record_type") == "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    config.pop("_wandb", None)
    return {"project": run.project, "name": run.display_name, "id": run.run_id, "config": config}
