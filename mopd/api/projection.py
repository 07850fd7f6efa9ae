"""The projection of one pair of tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

from mopd.api.options import ProjectionKeywords, config_of
from mopd.api.tokenizers import Tokenizer
from mopd.projection.build import build_projection as build
from mopd.runtime.payloads import projection_options
from mopd.types import Projection


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenProjection:
    """Student vocabulary -> teacher vocabulary, and the keywords that it was built with.

    ``matrix`` is W in CSR with the fold and the trie of path terms (`mopd.types.Projection`).
    """

    student: Tokenizer
    teacher: Tokenizer
    matrix: Projection
    keywords: Mapping[str, Any]


def build_projection(
    student: Tokenizer, teacher: Tokenizer, **options: Unpack[ProjectionKeywords]
) -> TokenProjection:
    """Which tokens of the teacher each token of the student becomes (docs/projection.md).

    From the vocabularies alone, in seconds for 150 000 tokens; build it once for a pair.

    Raises:
        ArgumentError: a keyword that a recipe's ``ctkd`` does not have, or a value it refuses.
        ConfigError: a role names what is not one token.
    """
    config = config_of("ctkd", options, top_k=None)
    matrix = build(student.vocabulary, teacher.vocabulary, projection_options(config))
    return TokenProjection(student=student, teacher=teacher, matrix=matrix, keywords=dict(options))
