"""Where metrics go: what is missing for it is told before anything is loaded."""

from __future__ import annotations

import importlib.machinery
from importlib.machinery import ModuleSpec

import pytest

from mopd.config import check_logging
from mopd.config.schema import LoggingSection, RunConfig


def problems(*, installed: bool = True, **keys: object) -> list[str]:
    config = RunConfig(logging=LoggingSection.model_validate(keys))
    return list(check_logging.check_logging(config, installed=installed))


def test_what_is_well() -> None:
    assert problems() == []
    assert problems(wandb=True, wandb_project="mine") == []


@pytest.mark.parametrize("found", [None, ModuleSpec("wandb", None)])
def test_a_package_that_is_missing_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, found: importlib.machinery.ModuleSpec | None
) -> None:
    """A folder `wandb` in the working directory is found as a package without an origin."""
    monkeypatch.setattr(check_logging, "find_spec", lambda name: found)
    (said,) = problems(wandb=True)
    assert said.startswith("logging.wandb: ") and "pip install 'mopd[wandb]'" in said
    assert problems(wandb=True, installed=False) == [], "a plan for another machine"
    assert problems() == []


def test_a_project_that_nobody_reads() -> None:
    (said,) = problems(wandb_project="mine")
    assert said.startswith("logging.wandb_project: is only read by logging.wandb=true")


def test_an_empty_project() -> None:
    (said,) = problems(wandb=True, wandb_project=" ")
    assert said.startswith("logging.wandb_project: is empty")
