"""The site is built from the same pages, without a warning, and shows every key of a recipe."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from mopd.config.schema import RunConfig
from mopd.config.section import Section
from tests.docs.test_names import _section
from tests.helpers.runs import ROOT, environment


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sphinx", reason="pip install 'mopd[docs]'")
    target = tmp_path_factory.mktemp("site")
    words = ["-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "docs", str(target)]
    built = subprocess.run(
        [sys.executable, *words, "-d", str(target / ".doctrees")],
        cwd=ROOT,
        env=environment() | {"NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert built.returncode == 0, built.stderr
    return target


def test_every_page_is_there_and_the_readme_leads_to_it(site: Path) -> None:
    first = (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").is_file()
        assert page.stem == "index" or f'href="{page.stem}.html' in first, page.name
    # the README's own links, which begin with docs/ there
    assert 'href="docs/' not in first and ".md" not in re.sub(r"<code.*?</code>", "", first)


def test_the_reference_has_what_the_modules_say(site: Path) -> None:
    shown = (site / "api.html").read_text()
    for name in ("TeacherScores", "build_projection", "ConfigError", "align_bytes", "VocabShard"):
        assert name in shown


def keys_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("schema_keys", ROOT / "docs" / "schema_keys.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["schema_keys"] = module
    spec.loader.exec_module(module)
    return module


def schema_keys(section: type[Section] = RunConfig, path: str = "") -> dict[str, object]:
    """Every plain key of the schema itself, by its path, and its default."""
    found: dict[str, object] = {}
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        if inner is None:
            found[f"{path}{name}"] = field.default
        else:
            below = ".<name>" if "dict" in str(field.annotation) else ""
            found |= schema_keys(inner, f"{path}{name}{below}.")
    return found


def test_the_table_of_keys_is_the_schema() -> None:
    """Read from the source's text, compared with what pydantic made of it."""
    pytest.importorskip("sphinx", reason="pip install 'mopd[docs]'")
    read = {
        f"{path}.{key.name}".lstrip("."): key
        for path, _, keys in keys_module().all_keys()
        for key in keys
    }
    wanted = schema_keys()
    assert set(read) == set(wanted)
    for name, default in wanted.items():
        shown = read[name].default
        if isinstance(default, bool) or default is None:
            assert yaml.safe_load(shown) is default, name
        elif isinstance(default, int | float):
            assert float(shown) == default, name
        elif isinstance(default, str | tuple):
            assert shown == (default if isinstance(default, str) else as_list(default)), name
    assert read["run.stall_s"].comment == "without a finished step, the run ends; 0 waits for ever"
    assert read["student.dtype"].comment == ""  # of the line before: not its own
    assert read["evaluate.metric"].comment.startswith("what `keep_best` and `patience` go by")


def as_list(value: tuple[object, ...]) -> str:
    return f"[{', '.join(map(str, value))}]"


def test_a_type_is_told_in_plain_words() -> None:
    pytest.importorskip("sphinx", reason="pip install 'mopd[docs]'")
    readable = keys_module().readable
    assert readable("PositiveInt | None") == "int >= 1, or null"
    assert readable("Annotated[float, Field(gt=0.0, le=1.0)]") == "float > 0, <= 1"
    assert readable("Literal['tail', 'trunc']") == "tail | trunc"
    assert readable("LossName | None") == "ctkd | gold | uld | kl | opd, or null"


def test_the_site_shows_the_keys(site: Path) -> None:
    shown = (site / "keys.html").read_text()
    for word in (
        "tensor_model_parallel_size",
        "stall_s",
        "lambda_chunk",
        "&lt;run&gt;/dump-&lt;step&gt;",
    ):
        assert word in shown
