"""``python -m tests.bench``: see README.md beside this file."""

from __future__ import annotations

import os
import sys

# Waiting threads must not burn the CPU time that is measured; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if __name__ == "__main__":
    from tests.bench.command import main

    sys.exit(main())
