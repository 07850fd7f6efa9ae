"""Where a run's metrics go: what each of the places needs."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from mopd.config.schema import LoggingSection, RunConfig


def check_logging(config: RunConfig, *, installed: bool) -> Iterator[str]:
    """One line per mistake: the key, what is wrong, the remedy.

    Args:
        installed: whether this machine is the one that trains, so that packages have to be there.
    """
    section = config.logging
    if not section.wandb and section.wandb_project != LoggingSection().wandb_project:
        yield (
            "logging.wandb_project: is only read by logging.wandb=true; set that, or leave the key "
            "out"
        )
    if not section.wandb_project.strip():
        yield "logging.wandb_project: is empty; name a project, or leave the key out"
    if section.wandb and installed and not _is_installed("wandb"):
        yield (
            "logging.wandb: the package wandb is not installed; pip install 'mopd[wandb]', or set "
            "logging.wandb=false"
        )


def _is_installed(package: str) -> bool:
    """A folder of that name, such as W&B's own in a working directory, is no package."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
