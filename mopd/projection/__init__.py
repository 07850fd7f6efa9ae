"""Student vocabulary -> teacher vocabulary: built once, kept on the CPU."""

from mopd.projection.build import ProjectionOptions, build_projection
from mopd.projection.shard import ProjectionShard
from mopd.projection.store import ProjectionStore
from mopd.types import FibreTrie, Projection

__all__ = [
    "FibreTrie",
    "Projection",
    "ProjectionOptions",
    "ProjectionShard",
    "ProjectionStore",
    "build_projection",
]
