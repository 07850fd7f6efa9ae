"""Which versions a run was made with, as a file beside its settings."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mopd import __version__
from mopd.metrics.text import replace_file

PACKAGES = (
    *("torch", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy"),
    *("vllm", "ray", "torch_npu", "transformer-engine"),
)


def installed_versions() -> dict[str, str]:
    """Name -> version of what computes; packages that are not installed are left out."""
    found = {"mopd": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"}


def write_versions(directory: Path) -> None:
    """Writes ``versions.json``: of the start that ran last."""
    replace_file(directory / "versions.json", json.dumps(installed_versions(), indent=2) + "\n")
