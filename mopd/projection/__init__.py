"""Student vocabulary -> teacher vocabulary: built once, kept on the CPU."""

from mopd.projection.build import build_projection
from mopd.projection.common import relaxed_common
from mopd.projection.options import ProjectionOptions, Similarity
from mopd.projection.shard import ProjectionShard
from mopd.projection.store import ProjectionStore
from mopd.types import FibreTrie, Projection

__all__ = [
    "FibreTrie",
    "Projection",
    "ProjectionOptions",
    "ProjectionShard",
    "ProjectionStore",
    "Similarity",
    "build_projection",
    "relaxed_common",
]
