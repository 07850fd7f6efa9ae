"""The optional dependencies resolve together with mopd's own, from metadata alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.missing import missing
from tests.helpers.runs import ROOT
from tests.helpers.wheels import fetch

RESOLVE_S = 240.0
# pip looks into wheels on the index instead of fetching them whole, and newer ones do so to the end
# of a dry run; torch's own are gigabytes.
METADATA = ("--dry-run", "--ignore-installed", "--only-binary", ":all:", "--use-feature=fast-deps")


def resolve(wanted: str, report: Path) -> subprocess.CompletedProcess[str]:
    """pip's answer to ``wanted``; nothing is installed, and ``report`` says what would be."""
    pip = fetch("pip>=25.1", pattern="pip-*.whl") / "pip"
    words = [sys.executable, str(pip), "--disable-pip-version-check", "install", *METADATA]
    return subprocess.run(
        [*words, "--report", str(report), wanted],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=RESOLVE_S,
    )


def versions(report: Path) -> dict[str, str]:
    told = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {
        one["metadata"]["name"].lower().replace("_", "-"): one["metadata"]["version"]
        for one in told
    }


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips (or fails in CI) where no package index is reached: what resolves is another matter."""
    done = resolve("omegaconf", tmp_path_factory.mktemp("index") / "report.json")
    if done.returncode:
        missing(f"no package index is reached: {done.stderr.strip().splitlines()[-1]}")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("index")
@pytest.mark.parametrize(
    ("extras", "packages"), [("ray,npu", ("ray", "torch-npu")), ("ray,vllm", ("ray", "vllm"))]
)
def test_extras_resolve(extras: str, packages: tuple[str, ...], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = resolve(f".[{extras}]", report)
    assert done.returncode == 0, done.stderr
    found = versions(report)
    assert {"mopd", "torch", "megatron-core", "transformers", *packages} <= found.keys()
    assert found["megatron-core"].startswith("0.16.")
    if "torch-npu" in found:  # one release of it for each release of torch
        assert found["torch-npu"].split(".")[:2] == found["torch"].split(".")[:2]


@pytest.mark.slow
@pytest.mark.usefixtures("index")
def test_what_contradicts_the_pins_does_not_resolve(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools>=77"]\n'
        'build-backend = "setuptools.build_meta"\n'
        '[project]\nname = "contradiction"\nversion = "1"\n'
        'dependencies = ["omegaconf>=2.3", "omegaconf<2.3"]\n'
    )
    done = resolve(str(tmp_path), tmp_path / "report.json")
    assert done.returncode != 0 and "omegaconf" in done.stderr
