"""Parts of tensors in safetensors files, and an index that finds any slice of the whole again.

The index maps a tensor's name to its shape, its type and its pieces: boxes that do not overlap,
each in some rank's file. Which boxes there are is the writer's layout; a reader asks for its own.

megatron-core has this as a strategy, `torch_dist`, which stores pickles. Loading a pickle runs
whatever is in it, and nothing that mopd loads may do that.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mopd.errors import ArtifactError
from mopd.fault_points import fault_point

_CODES = {  # safetensors' names of types
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in _CODES.items()}

Index = dict[str, dict[str, Any]]  # name -> {"shape", "dtype", "pieces": [Piece.to_json()]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The box of the whole tensor ``key`` that starts at ``offset``; ``name`` in its file."""

    key: str
    dtype: str
    whole: tuple[int, ...]  # shape of the whole tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    name: str

    def to_json(self) -> dict[str, Any]:
        return {field: getattr(self, field) for field in self.__slots__}


def dtype_code(dtype: torch.dtype) -> str:
    return _CODES[dtype]


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Write a safetensors file and flush it to the disk; its size and SHA-256.

    ``tensors`` are contiguous and in host memory. The digest is taken of the bytes that are
    handed over, not of what a disk makes of them. Raises OSError.
    """
    # Wide elements first: every tensor then starts at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": _CODES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    # Hashing runs beside writing: neither holds the interpreter's lock.
    with ThreadPoolExecutor(1) as hasher, open(path, "wb") as file:

        def put(content: Any) -> None:
            hasher.submit(digest.update, content)
            file.write(content)

        put(len(text).to_bytes(8, "little"))
        put(text)
        fault_point("save.shard.started")
        for name in names:
            put(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
        fault_point("save.shard.written")
        file.flush()
        os.fsync(file.fileno())
    fault_point("save.shard.synced")
    return {"size": 8 + len(text) + end, "sha256": digest.hexdigest()}


def build_index(pieces: Mapping[str, Sequence[Mapping[str, Any]]]) -> Index:
    """One index over the pieces of every file.

    Raises ValueError where the pieces of a tensor disagree or do not cover it exactly once.
    """
    index: Index = {}
    for file, found in pieces.items():
        for piece in found:
            entry = index.setdefault(
                piece["key"],
                {"shape": list(piece["whole"]), "dtype": piece["dtype"], "pieces": []},
            )
            if [list(piece["whole"]), piece["dtype"]] != [entry["shape"], entry["dtype"]]:
                raise ValueError(f"ranks disagree on shape or type of {piece['key']}")
            box = {key: list(piece[key]) for key in ("offset", "shape")}
            entry["pieces"].append({"file": file, "name": piece["name"], **box})
    for key, entry in index.items():
        covered = sum(math.prod(piece["shape"]) for piece in entry["pieces"])
        if covered != math.prod(entry["shape"]):
            raise ValueError(f"{key} has {math.prod(entry['shape'])} elements, pieces {covered}")
        if len({tuple(piece["offset"]) for piece in entry["pieces"]}) < len(entry["pieces"]):
            raise ValueError(f"two pieces of {key} begin at the same place")
    return index


class PieceReader:
    """Fills slices of whole tensors from whatever pieces overlap them. A context manager."""

    def __init__(self, directory: Path, index: Index) -> None:
        self._directory = directory
        self._index = index
        self._files: dict[str, Any] = {}
        self._elsewhere: dict[str, str] | None = None
        self._opened = ExitStack()

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def missing(self, key: str, *, whole: Sequence[int], dtype: torch.dtype) -> str | None:
        """Why ``key`` cannot be read as a tensor of this shape and type, or None."""
        entry = self._index.get(key)
        if entry is None:
            return f"has no {key}"
        wanted = [list(whole), _CODES[dtype]]
        if [entry["shape"], entry["dtype"]] != wanted:
            return f"has {key} as {entry['shape']} {entry['dtype']}, not {wanted[0]} {wanted[1]}"
        return None

    def dtype(self, key: str) -> torch.dtype | None:
        """The type of ``key``; None where it is in no piece."""
        entry = self._index.get(key)
        return None if entry is None else DTYPES[entry["dtype"]]

    def fill(self, target: torch.Tensor, *, key: str, offset: Sequence[int]) -> None:
        """Copy the box of ``key`` at ``offset``, of the shape of ``target``, into ``target``.

        Numbers are rounded where ``target`` has another type.
        Raises ArtifactError where the pieces leave a part of it open.
        """
        filled = 0
        for piece in self._index[key]["pieces"]:
            box = _overlap(offset, target.shape, piece["offset"], piece["shape"])
            if box is None:
                continue
            stored = self._open(piece["file"]).get_slice(piece["name"])
            source = tuple(
                slice(start - begin, stop - begin)
                for (start, stop), begin in zip(box, piece["offset"], strict=True)
            )
            place = tuple(
                slice(start - begin, stop - begin)
                for (start, stop), begin in zip(box, offset, strict=True)
            )
            target[place].copy_(stored[source])
            filled += math.prod(stop - start for start, stop in box)
        if filled != target.numel():
            raise ArtifactError(
                f"{self._directory} has {filled} of {target.numel()} elements of {key} at "
                f"{tuple(offset)}"
            )

    def names(self, file: str) -> list[str]:
        """Of all tensors in one file."""
        return list(self._open(file).keys())

    def file_of(self, name: str) -> str | None:
        """The file with a tensor that is in no index; None without one."""
        if self._elsewhere is None:
            files = sorted(path.name for path in self._directory.glob("*.safetensors"))
            self._elsewhere = {found: file for file in files for found in self.names(file)}
        return self._elsewhere.get(name)

    def whole(self, file: str, name: str) -> torch.Tensor:
        """A tensor that is in no index."""
        return self._open(file).get_tensor(name)

    def _open(self, name: str) -> Any:
        if name not in self._files:
            opened = safe_open(self._directory / name, framework="pt")
            self._files[name] = self._opened.enter_context(opened)
        return self._files[name]


def _overlap(
    offset: Sequence[int], shape: Sequence[int], other: Sequence[int], other_shape: Sequence[int]
) -> list[tuple[int, int]] | None:
    """The box that two boxes share, as (start, stop) per axis; None without one."""
    box = [
        (max(a, b), min(a + n, b + m))
        for a, n, b, m in zip(offset, shape, other, other_shape, strict=True)
    ]
    return box if all(start < stop for start, stop in box) else None
