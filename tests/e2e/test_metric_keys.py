"""docs/metrics.md names every number that a run writes, and none that no run can write."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mopd.demo import World
from mopd.tokens.chat import ChatTokenizer
from tests.helpers.dist import run_ranks
from tests.helpers.runs import ROOT, summary, train_here, words
from tests.helpers.source import shipped
from tests.helpers.stub_scorers import ModelScorer
from tests.helpers.stub_server import StubServer
from tests.helpers.upcycle import upcycle

pytestmark = [pytest.mark.dist, pytest.mark.e2e]

PAGE = (ROOT / "docs" / "metrics.md").read_text()
SHORT: dict[str, Any] = {"train__steps": 2, "evaluate__max_prompts_per_domain": 2}
# what a run's line must hold, by the loss: absent where a loss cannot know it
COMPARED = {"topk_overlap", "topk_mass", "teacher_topk_mass", "top1_projected"}


def documented(section: str | None = None) -> set[str]:
    """First columns of the page's tables, of one section or of all but summary.json."""
    parts = re.split(r"^## (.*)$", PAGE, flags=re.MULTILINE)
    tables = dict(zip(parts[1::2], parts[2::2], strict=True))
    chosen = [section] if section else [name for name in tables if name != "summary.json"]
    return {
        key
        for name in chosen
        for key in re.findall(r"^\| `([^`]+)` \|", tables[name], flags=re.MULTILINE)
    }


def pattern(key: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"<\\?\w+>", "[^/]+", re.escape(key)))


def written(run: Path) -> set[str]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {key for line in lines for key in json.loads(line)}


@pytest.fixture(scope="module")
def runs(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    same = {
        "teachers__sort__model": tiny_world.student,
        "teachers__sort__domains": "[]",
        "teachers__upper": "null",
    }
    experts = upcycle(tiny_world.student, root / "experts", noise=0.01)
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "ctkd": ("mopd_ctkd", {"evaluate__interval": 1, "ctkd__interior_rows": "true"}),
        "gold": ("mopd_gold", {"rollout__max_staleness": 1}),
        "kl": ("mopd_kl", same),
        "opd": ("mopd_ctkd", {"distillation__loss": "opd"}),
        "offpolicy": (
            "mopd_offpolicy",
            {
                "data__validation_path": tiny_world.data,
                "distillation__crossentropy_weight": 0.5,
                "distillation__teacher_weighting": "nll",
            },
        ),
        "moe": ("mopd_ctkd", {"student__model": experts, "distillation__loss": "uld"}),
    }
    for name, (recipe, keys) in cases.items():
        given = words(tiny_world, root, name, **{**SHORT, **keys})
        run_ranks(train_here, 1, recipe, given, timeout=240)
    tokenizer = ChatTokenizer.load(tiny_world.teachers["sort"])
    scorer = ModelScorer(tiny_world.teachers["sort"], vocab_size=tokenizer.vocabulary.size)
    with StubServer(scorer) as stub:
        server = {
            "teachers__sort__backend__type": "openai",
            "teachers__sort__backend__urls": f"[{stub.url}]",
            "distillation__top_k": 16,
        }
        given = words(tiny_world, root, "served", **{**SHORT, **server})
        run_ranks(train_here, 1, "mopd_ctkd", given, timeout=240)
    return {name: root / name for name in (*cases, "served")}


def test_every_number_of_a_run_is_documented(runs: dict[str, Path]) -> None:
    known = [pattern(key) for key in documented()]
    assert len(known) > 70
    for name, run in runs.items():
        unknown = {key for key in written(run) if not any(p.fullmatch(key) for p in known)}
        assert not unknown, f"{name}: docs/metrics.md does not name {sorted(unknown)}"
        assert set(summary(run)) == documented("summary.json")


def literals() -> Iterator[str]:
    for source in shipped():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_nothing_is_documented_that_no_code_writes(runs: dict[str, Path]) -> None:
    """Each key stands in one of the runs, or its first part is a text in the code."""
    seen = {key for run in runs.values() for key in written(run)}
    texts = {text.strip("/") for text in literals()}
    parts = texts | {text.split("/")[0] for text in texts}
    for key in documented():
        head = key.removeprefix("eval/").removeprefix("time/").split("/<")[0]
        in_runs = any(pattern(key).fullmatch(one) for one in seen)
        assert in_runs or head in parts, f"docs/metrics.md: no code writes {key}"


def test_a_loss_tells_what_it_can_know(runs: dict[str, Path]) -> None:
    for name, run in runs.items():
        kinds = {key.split("/")[0] for key in written(run)}
        assert {"entropy", "top1", "token_share", "alignment_1-1"} <= kinds, name
        assert ("kl_domain" in kinds) is (name != "moe"), name  # whose loss is uld
        assert COMPARED & kinds == (set() if name in ("opd", "moe") else COMPARED), name
        assert {"latency_p50", "latency_p95", "response_length_p95"} <= kinds, name
        first = summary(run)["first_kl"]
        line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        assert bool(first) is (name != "moe")
        assert all(line[f"first_kl/{t}"] == value for t, value in first.items())
