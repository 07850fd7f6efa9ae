"""What a projection is built with, as a value and as the text that is kept beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mopd.errors import ArtifactError


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity:
    """Embeddings of both sides' token STRINGS by one encoder, and how a cosine becomes a weight.

    The two models' own embeddings live in different spaces and cannot be compared. The weight is
    ``max(cosine, 0) ** power``; the largest ``top`` of a row are kept.
    """

    path: Path
    digest: str  # SHA-256 of the file, in hexadecimal digits
    power: float = 10.0
    top: int = 10

    @classmethod
    def of(cls, path: Path) -> Similarity:
        """With the digest of the file as it is now.

        Raises:
            ArtifactError: not readable.
        """
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ArtifactError(f"{path}: embeddings not readable ({error.strerror})") from error
        return cls(path=path, digest=digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionOptions:
    """``max_length`` teacher pieces at most; piece j of a token weighs ``gamma ** j``.

    ``map="exact"`` keeps tokens of equal bytes only. ``roles`` pairs further control tokens by
    their text, student to teacher. ``similarity`` fills rows that would be null.
    """

    max_length: int
    gamma: float
    map: Literal["pieces", "exact"] = "pieces"
    roles: Mapping[str, str] = field(default_factory=dict)
    similarity: Similarity | None = None

    def text(self) -> str:
        """JSON that differs where a projection of the same tokenizers would."""
        similarity = self.similarity and {
            "digest": self.similarity.digest,  # the file's content counts, not where it lies
            "power": self.similarity.power,
            "top": self.similarity.top,
        }
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        own |= {"roles": dict(self.roles), "similarity": similarity}
        return json.dumps(own, sort_keys=True)
