"""Fills the paths that a recipe leaves open with the embedded world."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from mopd.config.load import RECIPES
from mopd.demo.build import ensure_world
from mopd.demo.spec import TEACHERS, WorldSpec


class WorldFill:
    """For `load_config(fill=...)`. ``world_name`` is set once the world was used.

    Args:
        announce: print one line that says what was filled in, and show progress while building.
        spec: which world.
    """

    def __init__(self, *, announce: bool, spec: WorldSpec | None = None) -> None:
        self.world_name: str | None = None
        self._announce = announce
        self._spec = spec or WorldSpec()

    def __call__(self, recipe: DictConfig) -> DictConfig:
        open_keys = _open_keys(recipe)
        if not open_keys:
            return recipe
        root = Path(recipe.cache_dir) / "world"
        world = ensure_world(root, spec=self._spec, progress=self._announce)
        self.world_name = world.path.name
        layers: list[DictConfig | ListConfig] = [recipe]
        if "student.model" in open_keys:
            layers.append(OmegaConf.load(RECIPES / "world.yaml"))
            layers.append(OmegaConf.create({"student": {"model": str(world.student)}}))
        if "data.path" in open_keys:
            paths = {"path": str(world.data), "heldout_path": str(world.heldout)}
            layers.append(OmegaConf.create({"data": paths}))
        teachers = {
            name: {"model": str(path), "domains": [name]}
            for name, path in world.teachers.items()
            if f"teachers.{name}.model" in open_keys
        }
        layers.append(OmegaConf.create({"teachers": teachers}))
        if self._announce:
            print(f"not set: {', '.join(open_keys)}; using the embedded world {world.path}")
        return OmegaConf.merge(*layers)  # type: ignore[return-value]


def _open_keys(recipe: DictConfig) -> list[str]:
    """The keys that the world can fill: all of a recipe without teachers, else those unset."""
    keys = [key for key in ("student.model", "data.path") if OmegaConf.select(recipe, key) is None]
    named = OmegaConf.select(recipe, "teachers") or {}
    wanted = [name for name in TEACHERS if not named or name in named]
    keys += [
        f"teachers.{name}.model"
        for name in wanted
        if OmegaConf.select(recipe, f"teachers.{name}.model") is None
    ]
    return keys
