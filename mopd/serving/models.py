"""Loads a local transformers model without touching a network or running its code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mopd.errors import ConfigError


def load_causal_lm(model_dir: Path, *, device: torch.device, in_host_memory: bool = False) -> Any:
    """A causal LM in evaluation mode, float32 on CPU and its stored type elsewhere.

    Args:
        in_host_memory: as it will be on ``device``, but not there yet.
    Raises:
        ConfigError: the directory does not hold a model that transformers can load.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar per model would bury the run's own output
    dtype = torch.float32 if device.type == "cpu" else "auto"
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(model_dir), dtype=dtype, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{model_dir}: cannot be loaded as a causal LM ({reason})") from error
    return (model if in_host_memory else model.to(device)).eval()


def model_limits(model_dir: Path) -> tuple[int | None, int | None]:
    """(columns of the logits, tokens of the longest text) by config.json; None: not said there.

    Raises:
        ConfigError: config.json cannot be read.
    """
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        found = [config.get(key) for key in ("vocab_size", "max_position_embeddings")]
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    width, context = (value if isinstance(value, int) else None for value in found)
    return width, context


def model_fingerprint(model_dir: Path) -> str:
    """SHA-256 over config and weight files: which model a reply came from."""
    digest = hashlib.sha256()
    for path in [*sorted(model_dir.glob("*.safetensors")), model_dir / "config.json"]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
