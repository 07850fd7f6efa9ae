"""The embedded world: two small teachers, one student and their tasks, built on first use."""

from mopd.demo.build import ensure_peer, ensure_world, load_world
from mopd.demo.spec import World, WorldSpec

__all__ = ["World", "WorldSpec", "ensure_peer", "ensure_world", "load_world"]
