"""Fills the paths that a recipe leaves open with the embedded world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from mopd.config.check_servers import STARTED_TYPES
from mopd.config.data_files import find_files
from mopd.config.load import RECIPES
from mopd.demo.build import ensure_peer, ensure_world
from mopd.demo.spec import PEER, TEACHERS, World, WorldSpec
from mopd.errors import ConfigError


class WorldFill:
    """For `load_config(fill=...)`.

    Once the world was used ``world_name`` is its digest and ``announcement`` says what was filled.

    Args:
        announce: show progress while building.
        spec: which world.
        build: build what is missing; else its paths are named all the same, and no path that was
            given is looked at.
    """

    def __init__(
        self, *, announce: bool, spec: WorldSpec | None = None, build: bool = True
    ) -> None:
        self.world_name: str | None = None
        self.announcement: str | None = None
        self._announce = announce
        self._spec = spec or WorldSpec()
        self._build = build

    def __call__(self, recipe: DictConfig) -> DictConfig:
        loss = OmegaConf.select(recipe, "distillation.loss")
        names = (PEER,) if loss in ("kl", "opd") else TEACHERS
        open_keys = _open_keys(recipe, names)
        if not open_keys:
            return recipe
        if self._build:
            _refuse_missing(recipe)
        world = self._world(Path(recipe.cache_dir) / "world")
        self.world_name = world.path.name
        layers: list[DictConfig | ListConfig] = [recipe]
        if "student.model" in open_keys:
            of_loss = RECIPES / f"world_{loss}.yaml"
            layers.append(OmegaConf.load(RECIPES / "world.yaml"))
            layers += [OmegaConf.load(of_loss)] if of_loss.exists() else []
            if _starts_servers(recipe):
                layers.append(OmegaConf.load(RECIPES / "world_vllm.yaml"))
            layers.append(OmegaConf.create({"student": {"model": str(world.student)}}))
        if "data.path" in open_keys:
            paths = {"path": str(world.data), "heldout_path": str(world.heldout)}
            if OmegaConf.select(recipe, "rollout.backend.type") == "dataset":
                paths["validation_path"] = str(world.selection)
            layers.append(OmegaConf.create({"data": paths}))
        teachers = {
            name: self._teacher(world, name)
            for name in names
            if f"teachers.{name}.model" in open_keys
        }
        layers.append(OmegaConf.create({"teachers": teachers}))
        self.announcement = (
            f"not set: {', '.join(open_keys)}; using the embedded world {world.path}"
        )
        return OmegaConf.merge(*layers)  # type: ignore[return-value]

    def _world(self, root: Path) -> World:
        place = root / self._spec.digest()
        if not self._build:
            return World(path=place, report={})
        is_built = (place / "world.json").exists()
        return ensure_world(root, spec=self._spec, progress=self._announce and not is_built)

    def _teacher(self, world: World, name: str) -> dict[str, Any]:
        if name == PEER and not self._build:
            return {"model": str(world.peer)}
        if name == PEER:
            return {"model": str(ensure_peer(world, progress=self._announce))}
        return {"model": str(world.teachers[name]), "domains": [name]}


def _starts_servers(recipe: DictConfig) -> bool:
    backends = [OmegaConf.select(recipe, "rollout.backend")]
    for teacher in (OmegaConf.select(recipe, "teachers") or {}).values():
        backends.append(teacher.get("backend"))
    return any(
        backend is not None and backend.get("type") in STARTED_TYPES and not backend.get("urls")
        for backend in backends
    )


def _refuse_missing(recipe: DictConfig) -> None:
    """Paths that were given are looked at before minutes go into building a world."""
    given = {key: OmegaConf.select(recipe, key) for key in ("student.model", "data.path")}
    for name, teacher in (OmegaConf.select(recipe, "teachers") or {}).items():
        given[f"teachers.{name}.model"] = teacher.get("model")
    for key, path in given.items():
        if path is not None and not find_files(str(path)) and not Path(str(path)).is_dir():
            raise ConfigError(f"{key}: {path} does not exist")


def _open_keys(recipe: DictConfig, names: Sequence[str]) -> list[str]:
    """The keys that the world can fill.

    A recipe with teachers of its own keeps to them; the world's are then filled in by name only.
    """
    keys = [key for key in ("student.model", "data.path") if OmegaConf.select(recipe, key) is None]
    named = OmegaConf.select(recipe, "teachers") or {}
    own = any(teacher.get("model") is not None or _is_self(teacher) for teacher in named.values())
    keys += [
        f"teachers.{name}.model"
        for name in names
        if (name in named or not own)
        and OmegaConf.select(recipe, f"teachers.{name}.model") is None
        and not _is_self(named.get(name))
    ]
    return keys


def _is_self(teacher: Any) -> bool:
    """Whether a teacher's section says that the student itself is the teacher."""
    return teacher is not None and (teacher.get("backend") or {}).get("type") == "self"
