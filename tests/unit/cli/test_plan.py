"""`mopd plan`: what it prints, when it refuses, and that it needs neither torch nor models."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mopd.cli.main import main
from mopd.cli.plan_text import numbers
from mopd.config import model_shape

SHAPE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 28,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "model_type": "qwen3",
}


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalogue with one model of 1.7 B parameters; no model directory exists."""
    directory = tmp_path / "models"
    (directory / "Small-1.7B").mkdir(parents=True)
    (directory / "Small-1.7B" / "config.json").write_text(json.dumps(SHAPE))
    monkeypatch.setattr(model_shape, "CATALOGUE", directory)
    return directory


@pytest.fixture
def recipe(tmp_path: Path, catalogue: Path) -> str:
    """Four nodes of eight: eight ranks, a sampler, and two teachers that take turns."""
    engines = {"type": "vllm", "server": {"replicas": 2, "tensor_parallel_size": 4}}
    teacher = {"model": "org/Small-1.7B", "pool": "judges", "backend": engines}
    values = {
        "run": {"name": "four", "device": "cuda"},
        "launcher": "ray",
        "cluster": {"num_nodes": 4, "num_devices_per_node": 8, "device_memory_gb": 80},
        "pools": {"student": {"num_devices": 8}, "judges": {"shared": True}},
        "student": {
            "model": "org/Small-1.7B",
            "dtype": "bfloat16",
            "parallel": {"tensor_model_parallel_size": 2},
        },
        "teachers": {"math": teacher, "code": teacher | {"domains": ["code"]}},
        "train": {"micro_batch_size": 4},
        "rollout": {"backend": {"type": "vllm", "server": {"replicas": 3}}},
        "data": {"path": "rows.jsonl"},
    }
    path = tmp_path / "four.yaml"
    path.write_text(OmegaConf.to_yaml(values))
    return f"recipe={path}"


PICTURE = """\
+ node 0 ---+-----------+-----------+-----------+-----------+-----------+-----------+-----------+
| 0         | 1         | 2         | 3         | 4         | 5         | 6         | 7         |
| rank 0    | rank 1    | rank 2    | rank 3    | rank 4    | rank 5    | rank 6    | rank 7    |
+-----------+-----------+-----------+-----------+-----------+-----------+-----------+-----------+
+ node 1 ---+-----------+-----------+-----------+-----------+-----------+-----------+-----------+
| 0         | 1         | 2         | 3         | 4         | 5         | 6         | 7         |
| math 0    | math 0    | math 0    | math 0    | math 1    | math 1    | math 1    | math 1    |
| code 0    | code 0    | code 0    | code 0    | code 1    | code 1    | code 1    | code 1    |
+-----------+-----------+-----------+-----------+-----------+-----------+-----------+-----------+
+ node 2 ---+-----------+-----------+-----------+-----------+-----------+-----------+-----------+
| 0         | 1         | 2         | 3         | 4         | 5         | 6         | 7         |
| rollout 0 | rollout 1 | rollout 2 | -         | -         | -         | -         | -         |
+-----------+-----------+-----------+-----------+-----------+-----------+-----------+-----------+
"""


def test_a_cluster_as_text(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe]) == 0
    text = capsys.readouterr().out
    assert text.startswith("four: 4 nodes x 8 gpu with 80 GB\n")
    assert PICTURE in text
    assert max(map(len, text.splitlines())) <= 100
    assert "student  gpu   8        no      student: 8 ranks (tp 2 x dp 4)\n" in text
    assert "judges   gpu   8        yes     teachers.math: 2 engines of 4 devices; teach" in text
    assert "note: 13 of 32 devices of the cluster have nobody" in text
    assert "!" not in text and "TOO LARGE" not in text


def test_the_same_as_json(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    pools = {pool["name"]: pool for pool in found["plan"]["pools"]}
    assert list(pools) == ["student", "rollout", "judges"]
    assert pools["judges"]["members"][0] == {
        "owner": "teachers.math",
        "kind": "engine",
        "number": 0,
        "slots": [{"node": 1, "index": index} for index in range(4)],
    }
    assert found["problems"] == [] and "Guessed:" in found["memory"]["assumptions"]
    members = {(one["owner"], one["what"]): one for one in found["memory"]["members"]}
    ranks = members["student", "rank"]
    # 1.72 B parameters in bfloat16 over two ranks, and 12 bytes each for Adam
    assert ranks["numbers"] == list(range(8))
    assert ranks["bytes"]["weights"] == pytest.approx(1.72e9, rel=0.01)
    assert ranks["bytes"]["optimizer"] == 6 * ranks["bytes"]["weights"]
    assert ranks["bytes"]["gradients"] == 2 * ranks["bytes"]["weights"]
    engine = members["teachers.math", "engine"]["bytes"]
    assert engine["weights"] == pytest.approx(1.72e9 / 2, rel=0.01)  # 16 bits over four devices


def test_what_does_not_fit_on_a_device_is_marked(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", recipe, "cluster.device_memory_gb=16"]) == 1
    text = capsys.readouterr().out
    (row,) = [line for line in text.splitlines() if line.startswith("student 0-7")]
    assert row.endswith(" !")
    flat = " ".join(text.split())
    assert "TOO LARGE: student (rank) needs" in flat
    assert "set student.optimizer.use_distributed_optimizer=true" in flat


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster.num_nodes=1"], "cluster: 19 devices (gpu) are asked for (student 8 in groups"),
        (["student.model=org/Other"], "student.model: neither org/Other/config.json nor"),
        (["teachers.math.model=org/Other"], "teachers.math.model: neither org/Other"),
        (["student.parallel.tensor_model_parallel_size=3"], "pools.student.num_devices: 8 ranks"),
        (
            [
                "student.parallel.pipeline_model_parallel_size=4",
                "student.recompute.granularity=full",
                "student.recompute.num_layers=4",
            ],
            "student.recompute.num_layers=4: method=uniform",
        ),
        (["train.num_prompts_per_step=6"], "is not divisible by the data-parallel size 4"),
        (["pools.other.num_devices=2"], "pools.other: nobody is in it"),
        (["rollout.backend.wrong=1"], "unknown key `rollout.backend.wrong`"),
        (["--svg", "/nowhere/plan.svg"], "--svg: /nowhere/plan.svg cannot be written"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_in_one_line(
    recipe: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", recipe, *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert said in captured.err


def test_members_that_have_no_room_beside_each_other(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", recipe, "cluster.device_memory_gb=25"]) in (0, 1)
    assert "together" not in capsys.readouterr().out
    shared = ["pools.student.shared=true", "rollout.pool=student", "cluster.device_memory_gb=26"]
    main(["plan", recipe, *shared])
    text = " ".join(capsys.readouterr().out.split())
    assert "pools.student.shared: the members of one device would need" in text
    assert "| rank 0 " in text and "| rollout 0 " in text


def test_two_ranks_and_processors_beside_accelerators(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pools.student.num_devices=2", "pools.judges.device=cpu"]
    words += ["cluster.num_nodes=1", "cluster.num_devices_per_node=null"]
    assert main(["plan", recipe, *words]) == 0
    text = capsys.readouterr().out
    assert "four: 1 node x 5 gpu with 80 GB\n" in text
    assert "  on its processors: math 0, code 0, math 1, code 1\n" in text


def test_models_in_the_students_processes(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    inside = ["launcher=torchrun", "rollout.backend.type=hf", "rollout.backend.server.replicas=1"]
    inside += ["rollout.backend.batch_size=8", "--json"]
    assert main(["plan", recipe, *inside]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["inside"] == ["rollout"]
    ranks = {one["what"]: one for one in found["memory"]["members"] if one["owner"] == "student"}
    assert ranks["rank, lead"]["numbers"] == [0, 2, 4, 6]
    assert ranks["rank, lead"]["bytes"]["sampler, teachers"] > 2 * 1.72e9
    assert "sampler, teachers" not in ranks["rank"]["bytes"]


def test_the_svg_is_whole_and_escaped(recipe: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    assert main(["plan", recipe, "--svg", str(path)]) == 0
    root = ET.fromstring(path.read_text())
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    for rank in range(8):
        assert texts.count(f"rank {rank}") == 1
    assert texts.count("math 1") == texts.count("code 1") == 4  # every device shows all its owners
    assert texts.count("node 3") == 1
    from mopd.cli.plan_svg import picture_svg
    from mopd.runtime.placement import Member, Plan, Pool, Slot

    slots = (Slot(node=0, index=0),)
    member = Member(owner="teachers.<b>&", kind="engine", number=0, slots=slots)
    pool = Pool(name="x", device="gpu", shared=False, slots=slots, members=(member,))
    plan = Plan(num_nodes=1, num_devices_per_node=1, pools=(pool,), inside=(), reached=(), notes=())
    named = ET.fromstring(picture_svg(plan, title="<script>"))
    shown = [node.text or "" for node in named.iter("{http://www.w3.org/2000/svg}text")]
    assert "<b>& 0" in shown and any("<script>" in text for text in shown)


@pytest.mark.parametrize(
    "name", ["mopd_ctkd", "mopd_gold", "mopd_kl", "mopd_opd", "mopd_offpolicy", "mopd_ctkd_vllm"]
)
def test_recipes_of_a_world_that_is_not_built(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = f"cache_dir={tmp_path / 'cache'}"
    assert main(["plan", f"recipe={name}", cache, "run.device=cpu"]) == 0
    text = capsys.readouterr().out
    assert "| rank 0 " in text and "note: memory is left out: student.model is not set" in text
    assert ("sort 0" in text) == (name == "mopd_ctkd_vllm")
    assert not (tmp_path / "cache").exists()


def test_a_model_directory_comes_before_the_catalogue(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own" / "Small-1.7B"
    own.mkdir(parents=True)
    (own / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": 2}))
    assert main(["plan", recipe, f"student.model={own}", "--json"]) == 0
    members = json.loads(capsys.readouterr().out)["memory"]["members"]
    of_layers = 26 * (2048 * (2 * 2048 + 2 * 1024) + 3 * 2048 * 6144)
    assert members[0]["bytes"]["weights"] == pytest.approx(1.72e9 - of_layers, rel=0.01)


def test_a_plan_needs_no_torch(recipe: str, catalogue: Path) -> None:
    probe = (
        "import sys, pathlib, mopd.config.model_shape as shape\n"
        f"shape.CATALOGUE = pathlib.Path({str(catalogue)!r})\n"
        "from mopd.cli.main import main\n"
        f"code = main(['plan', {recipe!r}])\n"
        "heavy = ('torch', 'megatron', 'transformers')\n"
        "print([name for name in heavy if name in sys.modules], code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[] 0"


@pytest.mark.parametrize(
    ("some", "said"),
    [((0,), "0"), ((0, 1, 2), "0-2"), ((0, 4, 8), "0, 4 .. 8"), ((0, 1, 5), "0-1, 5")],
)
def test_numbers(some: tuple[int, ...], said: str) -> None:
    assert numbers(some) == said


def test_ranks_that_torchrun_cannot_start_so_are_refused(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three nodes hold eight ranks, but not as many each."""
    words = ["plan", recipe, "cluster.num_nodes=3"]
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, "launcher=torchrun"]) == 2
    assert "8 ranks in tensor-parallel groups of 2" in capsys.readouterr().err


def test_a_teacher_without_a_model_is_said_to_be_left_out(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", recipe, "teachers.math.model=null"]) == 0
    text = capsys.readouterr().out
    assert "note: memory of teachers.math is left out: teachers.math.model is not set" in text
    assert "memory of teachers.code is left out" not in text
