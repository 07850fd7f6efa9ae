"""Slots, the reader's refusals, the streamed safetensors header, the norm and the attention."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from mopd.errors import ArtifactError
from mopd.storage.files import replace_directory
from mopd.student.hf_export import write_header
from mopd.student.hf_io import HfReader, build_slots
from mopd.student.spec import rms_norm
from tests.helpers.shapes import QWEN3


def test_every_stage_gets_its_layers_and_the_last_a_copy_of_the_embedding() -> None:
    slots = build_slots(QWEN3, pp_size=2)
    assert {slot.stage for slot in slots} == {0, 1}
    names = [name for slot in slots if slot.exported for name in slot.tensors]
    assert len(names) == len(set(names)) == 1 + 4 * 11 + 1
    layer_two = next(s for s in slots if "model.layers.2.self_attn.o_proj.weight" in s.tensors)
    assert (layer_two.stage, layer_two.parameter.split(".")[3]) == (1, "0")
    copies = [slot for slot in slots if not slot.exported]
    assert [(copy.stage, copy.parameter) for copy in copies] == [(1, "0.output_layer.weight")]


def test_reads_slices_of_indexed_shards(tmp_path: Path) -> None:
    full = {"a": torch.arange(12.0).view(4, 3), "b": torch.arange(5.0)}
    for number, (name, tensor) in enumerate(full.items()):
        save_file({name: tensor}, tmp_path / f"model-{number}.safetensors")
    index = {"weight_map": {"a": "model-0.safetensors", "b": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    reader = HfReader(tmp_path)
    part = reader.part("a", (4, 3), (slice(1, 3), slice(None)))
    assert torch.equal(part, full["a"][1:3])
    assert torch.equal(reader.part("b", (5,), (slice(5, 5),)), torch.empty(0))
    with pytest.raises(ArtifactError, match="no tensor c"):
        reader.part("c", (1,), (slice(None),))
    with pytest.raises(ArtifactError, match="implies"):
        reader.part("b", (6,), (slice(None),))


def test_a_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="safetensors format"):
        HfReader(tmp_path).part("a", (1,), (slice(None),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_file_is_valid_safetensors(dtype: torch.dtype) -> None:
    tensors = {"x": torch.randn(3, 5).to(dtype), "y": torch.randn(7).to(dtype)}
    buffer = io.BytesIO()
    write_header(buffer, {name: tuple(t.shape) for name, t in tensors.items()}, dtype)
    assert buffer.tell() % 8 == 0
    for tensor in tensors.values():
        buffer.write(tensor.view(torch.uint8).numpy().data)
    loaded = load(buffer.getvalue())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_replace_directory_swaps_whole_directories(tmp_path: Path) -> None:
    target, part = tmp_path / "model", tmp_path / "model.part"
    for value in (1.0, 2.0):
        part.mkdir()
        save_file({"x": torch.tensor([value])}, part / "x.safetensors")
        replace_directory(part, target)
    assert float(load_file(target / "x.safetensors")["x"]) == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_rms_norm_equals_torch() -> None:
    hidden, weight = torch.randn(5, 2, 8), torch.randn(8)
    expected = torch.nn.functional.rms_norm(hidden, (8,), weight, 1e-6)
    torch.testing.assert_close(rms_norm(hidden, weight, 1e-6), expected)
