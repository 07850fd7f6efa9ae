"""Exit code 0 when the Ray cluster at RAY_ADDRESS has so many nodes: ``has_nodes.py 4``."""

from __future__ import annotations

import logging
import os
import sys

import ray

ray.init(
    address=os.environ["RAY_ADDRESS"],
    log_to_driver=False,
    logging_level=logging.CRITICAL,
)
sys.exit(sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]))
