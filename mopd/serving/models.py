"""Loads a local transformers model without touching a network or running its code."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mopd.errors import ConfigError


def load_causal_lm(model_dir: Path, *, device: torch.device) -> Any:
    """A causal LM in evaluation mode, float32 on CPU and its stored type elsewhere.

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
    return model.to(device).eval()


def model_fingerprint(model_dir: Path) -> str:
    """SHA-256 over config and weight files: which model a reply came from."""
    digest = hashlib.sha256()
    for path in [*sorted(model_dir.glob("*.safetensors")), model_dir / "config.json"]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
