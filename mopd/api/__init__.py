"""mopd on plain tensors, for notebooks and other trainers: no Megatron, no process group.

Use it as ``import mopd``: every name below is also one of the package's own.
"""

from mopd.api.aligned import AlignedText, Chunk, align_text, align_tokens
from mopd.api.losses import ctkd_loss, gold_loss, kl_loss, opd_loss, uld_loss
from mopd.api.options import (
    CtkdOptions,
    DivergenceOptions,
    GoldOptions,
    HybridOptions,
    KlOptions,
    OpdOptions,
    ProjectionKeywords,
    SharedOptions,
    UldOptions,
)
from mopd.api.projection import TokenProjection, build_projection
from mopd.api.scores import TopK, top_k_of
from mopd.api.text_loss import TextLoss
from mopd.api.tokenizers import Tokenizer, load_tokenizer
from mopd.errors import ArgumentError, ConfigError, MopdError

__all__ = [
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
]
