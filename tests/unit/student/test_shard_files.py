"""Boxes of flattened tensors, safetensors by our own hand, slices from any pieces."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mopd.errors import ArtifactError
from mopd.student.shard_files import Piece, PieceReader, build_index, dtype_code, write_tensors
from mopd.student.sharded import boxes

WHOLE = torch.arange(6 * 4 * 3, dtype=torch.float32).view(6, 4, 3)


@pytest.mark.parametrize("shape", [(7,), (4, 3), (3, 1, 4), (2, 3, 2, 2), (1, 5)])
def test_boxes_are_the_range(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
        expected, most = start, 2 * len(shape) - 1
        found = list(boxes(shape, start, stop))
        assert len(found) <= most
        for begin, offset, size in found:
            box = whole[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
            assert begin == expected
            count = math.prod(size)
            assert box.flatten().tolist() == list(range(begin, begin + count))
            expected += count
        assert expected == max(start, stop)


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {
        "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(3, 3).bfloat16(),
        "single": torch.randn(2, 5),
        "long": torch.arange(3),
        "flag": torch.tensor([True, False, True]),
        "nothing": torch.empty(0, 4),
    }
    entry = write_tensors(tmp_path / "a.safetensors", tensors)
    assert entry["size"] == (tmp_path / "a.safetensors").stat().st_size
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert all(found[name].dtype == tensors[name].dtype for name in tensors)


def written(directory: Path, cuts: dict[str, list[tuple[slice, ...]]]) -> dict[str, Any]:
    """``WHOLE`` as "x", in pieces of several files; the notes of each file."""
    notes = {}
    for file, slices in cuts.items():
        tensors, pieces = {}, []
        for number, cut in enumerate(slices):
            tensors[str(number)] = WHOLE[cut].contiguous()
            piece = Piece(
                key="x",
                dtype=dtype_code(WHOLE.dtype),
                whole=tuple(WHOLE.shape),
                offset=tuple(part.start or 0 for part in cut),
                shape=tuple(WHOLE[cut].shape),
                name=str(number),
            )
            pieces.append(piece.to_json())
        write_tensors(directory / file, tensors)
        notes[file] = pieces
    return notes


ALL = slice(None)
CUTS = {
    "a.safetensors": [(slice(0, 2), ALL, ALL), (slice(2, 3), slice(0, 1), ALL)],
    "b.safetensors": [(slice(2, 3), slice(1, 4), ALL), (slice(3, 6), ALL, slice(0, 2))],
    "c.safetensors": [(slice(3, 6), ALL, slice(2, 3))],
}


def test_any_slice_is_found(tmp_path: Path) -> None:
    index = build_index(written(tmp_path, CUTS))
    with PieceReader(tmp_path, index) as reader:
        for cut in [(0, 6, 0, 4, 0, 3), (1, 4, 1, 3, 1, 3), (2, 3, 0, 2, 0, 3), (5, 6, 3, 4, 2, 3)]:
            box = tuple(slice(cut[2 * axis], cut[2 * axis + 1]) for axis in range(3))
            target = torch.full_like(WHOLE[box], float("nan"))
            reader.fill(target, key="x", offset=cut[::2])
            assert torch.equal(target, WHOLE[box])
        assert reader.missing("y", whole=(1,), dtype=torch.float32) == "has no y"
        assert "not [6, 4, 3] BF16" in str(
            reader.missing("x", whole=(6, 4, 3), dtype=torch.bfloat16)
        )
        assert reader.missing("x", whole=(6, 4, 3), dtype=torch.float32) is None


def test_a_hole_is_seen(tmp_path: Path) -> None:
    notes = written(tmp_path, CUTS)
    index = build_index(notes)
    index["x"]["pieces"].pop()
    with PieceReader(tmp_path, index) as reader, pytest.raises(ArtifactError, match="60 of 72"):
        reader.fill(torch.empty_like(WHOLE), key="x", offset=(0, 0, 0))
    missing = {file: pieces for file, pieces in notes.items() if file != "c.safetensors"}
    with pytest.raises(ValueError, match="72 elements, pieces 60"):
        build_index(missing)
    twice = {**missing, "d": [notes["a.safetensors"][0]] * 2}
    twice["d"] = [{**notes["a.safetensors"][1], "shape": [1, 4, 3]}]
    with pytest.raises(ValueError, match="begin at the same place"):
        build_index(twice)
