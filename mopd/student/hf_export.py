"""Writing a Hugging Face directory while the weights stream by."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist

from mopd.storage.files import fsync_directory, replace_directory
from mopd.student.hf_io import ModelView, describe, iter_hf_weights

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def save_hf(
    model: ModelView,
    out_dir: str | Path,
    *,
    source_dir: str | Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config, weights, generation config and tokenizer files; `out_dir` appears whole.

    ``dtype`` is that of the file; None: the model's. Collective over all ranks of the job: experts
    may lie on several replicas. The first replica's lead writes.
    """
    topology = model.topology
    if topology.dp_rank > 0:
        if topology.ep_size > 1:
            for _ in iter_hf_weights(model):
                pass
        return
    out_dir, is_lead = Path(out_dir), topology.is_lead
    part = out_dir.with_name(out_dir.name + ".part")
    dtype = dtype or model.dtype
    if is_lead:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        with open(part / "model.safetensors", "wb") as file:
            write_header(file, describe(model), dtype)
            for _, tensor in iter_hf_weights(model):
                assert tensor is not None
                file.write(tensor.to(dtype).contiguous().cpu().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        _copy_side_files(Path(source_dir), part, dtype)
        fsync_directory(part)
        replace_directory(part, out_dir)
    else:
        for _ in iter_hf_weights(model):
            pass
    dist.barrier(group=model.topology.replica_group)


def write_header(file: BinaryIO, sizes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """The safetensors header, which needs shapes only: the data can then be streamed."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in sizes.items():
        end = offset + torch.Size(size).numel() * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(size),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts on an 8-byte boundary
    file.write(struct.pack("<Q", len(text)) + text)


def _copy_side_files(source_dir: Path, target_dir: Path, dtype: torch.dtype) -> None:
    config = json.loads((source_dir / "config.json").read_text(encoding="utf-8"))
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(dtype).removeprefix("torch.")
    (target_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in _COPIED:
        if (source_dir / name).exists():
            shutil.copyfile(source_dir / name, target_dir / name)
