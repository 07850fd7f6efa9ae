"""mopd: multi-teacher on-policy distillation for tensor- and pipeline-parallel students.

In a notebook: docs/library.md. Its names are read from `mopd.api` when they are first used, so that
``import mopd`` imports no torch and the command line stays quick.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

_NAMES = (
    "AlignedText",
    "ArgumentError",
    "Chunk",
    "ConfigError",
    "CtkdOptions",
    "DivergenceOptions",
    "GoldOptions",
    "HybridOptions",
    "KlOptions",
    "MopdError",
    "OpdOptions",
    "ProjectionKeywords",
    "SharedOptions",
    "TextLoss",
    "TokenProjection",
    "Tokenizer",
    "TopK",
    "UldOptions",
    "align_text",
    "align_tokens",
    "build_projection",
    "ctkd_loss",
    "gold_loss",
    "kl_loss",
    "load_tokenizer",
    "opd_loss",
    "top_k_of",
    "uld_loss",
)

if TYPE_CHECKING:
    from mopd.api import *  # noqa: F403


def __getattr__(name: str) -> object:
    if name not in _NAMES:
        raise AttributeError(f"module 'mopd' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("mopd.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
