"""A recipe whose engines run already: where their URLs go, and that it is still a recipe."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mopd.config import load_config
from mopd.config.check import check_config
from mopd.config.schema import RunConfig
from mopd.demo import World
from mopd.runtime.reached import KEY_VARIABLE, GivenServers, filled
from tests.helpers.runs import words

URLS = {
    "rollout": ("http://127.0.0.1:18000",),
    "teachers.sort": ("http://127.0.0.1:18001", "http://127.0.0.1:18002"),
}


def load(world: World, directory: Path, **more: object) -> RunConfig:
    overrides = words(world, directory, "x", launcher="ray", **more)
    return load_config("mopd_ctkd", overrides)


def test_transformers_in_actors_are_asked_like_servers(tiny_world: World, tmp_path: Path) -> None:
    config = load(tiny_world, tmp_path, rollout__pool="rollout")
    found = filled(config, URLS)
    assert found.rollout.backend.type == "vllm"
    assert found.rollout.backend.urls == URLS["rollout"]
    assert found.teachers["sort"].backend.type == "mopd"
    assert found.teachers["sort"].backend.urls == URLS["teachers.sort"]
    for backend in (found.rollout.backend, found.teachers["sort"].backend):
        assert backend.api_key_env == KEY_VARIABLE


def test_nothing_else_changes(tiny_world: World, tmp_path: Path) -> None:
    config = load(tiny_world, tmp_path, rollout__pool="rollout")
    found, before = filled(config, URLS).model_dump(), config.model_dump()
    for section in (found["rollout"], before["rollout"]):
        del section["backend"]
    for section in (found["teachers"]["sort"], before["teachers"]["sort"]):
        del section["backend"]
    assert found == before  # the other teacher as well
    assert filled(config, {}) == config


def test_what_is_served_already_keeps_its_kind(tiny_world: World, tmp_path: Path) -> None:
    for kind in ("vllm", "mopd"):
        config = load(tiny_world, tmp_path, teachers__sort__backend__type=kind)
        backend = filled(config, {"teachers.sort": URLS["teachers.sort"]}).teachers["sort"].backend
        assert backend.type == kind
        unchanged = config.teachers["sort"].backend
        kept = {"urls": unchanged.urls, "api_key_env": unchanged.api_key_env}
        assert backend.model_copy(update=kept) == unchanged


@pytest.mark.parametrize("rollout", [{}, {"rollout__pool": "rollout"}])
def test_the_filled_recipe_passes_every_check(
    rollout: dict[str, str], tiny_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`model_copy` validates nothing: what it makes must be what a user could have written."""
    monkeypatch.setenv(KEY_VARIABLE, "key")
    config = load(tiny_world, tmp_path, **rollout)
    check_config(config, world_size=1)
    urls = {name: found for name, found in URLS.items() if rollout or name != "rollout"}
    found = filled(config, {**urls, "teachers.upper": ("http://127.0.0.1:18003",)})
    again = RunConfig.model_validate(found.model_dump())
    assert again == found
    # pools are the driver's: a rank finds its engines at URLs, whoever placed them
    check_config(_without_pools(again), world_size=1)


def _without_pools(config: RunConfig) -> RunConfig:
    rollout = config.rollout.model_copy(update={"pool": None})
    return config.model_copy(update={"rollout": rollout})


def test_the_key_is_there_while_the_servers_are(
    tiny_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    servers = GivenServers(load(tiny_world, tmp_path), URLS, key="secret")
    assert KEY_VARIABLE not in os.environ
    servers.start(tmp_path, device="cpu")
    assert os.environ[KEY_VARIABLE] == "secret"
    assert servers.reach().teachers["sort"].backend.urls == URLS["teachers.sort"]
    servers.close()
    assert KEY_VARIABLE not in os.environ
    servers.close()  # twice does no harm
