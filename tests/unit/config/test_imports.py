"""Reading a recipe costs no torch."""

from __future__ import annotations

import subprocess
import sys

PROBE = """
import sys
import mopd.config.check, mopd.config.load
import mopd.metrics, mopd.metrics.console, mopd.metrics.summary
heavy = ("torch", "megatron", "transformers", "tensorboard")
print([name for name in heavy if name in sys.modules])
"""


def test_config_and_metrics_import_without_heavy_libraries() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
