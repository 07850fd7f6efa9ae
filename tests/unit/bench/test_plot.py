"""The picture and the table of benchmark results."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

from tests.bench.plot import main, table
from tests.bench.rows import BUILDERS
from tests.bench.targets import TARGETS

RESULTS = {
    "jsd_full": {"ratio": 0.7, "peak_tensors": 1.3, "error": {"value": 1e-6, "gradient": 2e-6}},
    "uld_exact": {"ratio": 9.0, "peak_tensors": None, "error": {"value": 1e-6}},
}


def test_targets_name_rows_that_exist() -> None:
    assert set(TARGETS) <= set(BUILDERS)


def test_a_target_that_is_met_is_bold() -> None:
    lines = table(RESULTS).splitlines()
    assert lines[2] == "| `jsd_full` | **0.70** | 1.30 | 2e-06 | 0.80 (1.2) |"
    assert lines[3] == "| `uld_exact` | 9.00 | - | 1e-06 | 6.50 (3) |"
    assert len(lines) == 4


def test_the_picture_is_svg_with_a_bar_per_number(tmp_path: Path) -> None:
    source, out = tmp_path / "bench.json", tmp_path / "bench.svg"
    source.write_text(json.dumps(RESULTS))
    assert main([str(source), "--out", str(out)]) == 0
    root = ElementTree.fromstring(out.read_text())
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "0.70" in texts and "1.30" in texts and "9.00" in texts
    assert "jsd_full" in texts and "gold_512" not in texts
