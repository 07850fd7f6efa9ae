"""Recipes: YAML and command line in, one frozen and validated `RunConfig` out. Imports no torch."""

from mopd.config.load import load_config
from mopd.config.schema import RunConfig

__all__ = ["RunConfig", "load_config"]
