"""`mopd projection`: every verb on the tiny world, and one line for what users get wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from mopd.cli.main import main
from mopd.demo import World
from mopd.projection import ProjectionOptions, ProjectionStore, Similarity
from mopd.projection.audit import CLASSES
from mopd.tokens.chat import ChatTokenizer
from mopd.types import EXACT, SIMILAR, SPECIAL


@pytest.fixture
def pair(tiny_world: World) -> list[str]:
    return ["--student", str(tiny_world.student), "--teacher", str(tiny_world.teachers["sort"])]


@pytest.fixture
def built(pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    path = str(tmp_path / "w.safetensors")
    assert main(["projection", "build", *pair, "--out", path]) == 0
    capsys.readouterr()
    return path


def test_build_writes_what_a_run_reads(
    pair: list[str], tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sub" / "w.safetensors"
    words = ["projection", "build", *pair, "--out", str(path), "--gamma", "0.1"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert re.fullmatch(
        r".*: \d+\.\d\d MB, 552 x 560, \d+ weights, \d\d\.\d% exact, \d\.\d s\n", printed
    )
    student, teacher = (
        ChatTokenizer.load(folder).vocabulary
        for folder in (tiny_world.student, tiny_world.teachers["sort"])
    )
    options = ProjectionOptions(max_length=4, gamma=0.1)
    loaded = ProjectionStore(tmp_path).get(student, teacher, options, path=str(path))
    assert len(loaded.col) == int(printed.split(" weights")[0].split()[-1])
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(path) and told["weights"] == len(loaded.col)
    assert (told["student_size"], told["teacher_size"]) == (552, 560)


def test_build_takes_the_end_of_turn_of_the_recipe(
    pair: list[str], tiny_world: World, tmp_path: Path
) -> None:
    path = tmp_path / "w.safetensors"
    eos = {"student": "<|endoftext|>", "teacher": "<|pad|>"}
    words = [word for side, token in eos.items() for word in (f"--{side}-eos", token)]
    assert main(["projection", "build", *pair, "--out", str(path), *words]) == 0
    student, teacher = (
        ChatTokenizer.load(folder, eos_token=token).vocabulary
        for folder, token in zip(
            (tiny_world.student, tiny_world.teachers["sort"]), eos.values(), strict=True
        )
    )
    options = ProjectionOptions(max_length=4, gamma=0.0)
    assert ProjectionStore(tmp_path).get(student, teacher, options, path=str(path)).teacher_size


def test_build_takes_the_map_roles_and_embeddings(
    pair: list[str], tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strings = tmp_path / "strings.safetensors"
    draw = np.random.default_rng(0)
    sides = {name: draw.normal(size=(600, 8)).astype(np.float32) for name in ("student", "teacher")}
    save_file(sides, strings)
    path = tmp_path / "w.safetensors"
    role = "<|im_start|>=<|start_header_id|>"
    words = ["--map", "exact", "--role", role, "--similarity", str(strings)]
    assert main(["projection", "build", *pair, "--out", str(path), *words]) == 0
    student, teacher = (
        ChatTokenizer.load(folder).vocabulary
        for folder in (tiny_world.student, tiny_world.teachers["sort"])
    )
    options = ProjectionOptions(
        max_length=4,
        gamma=0.0,
        map="exact",
        roles={"<|im_start|>": "<|start_header_id|>"},
        similarity=Similarity.of(strings),
    )
    loaded = ProjectionStore(tmp_path).get(student, teacher, options, path=str(path))
    assert {EXACT, SPECIAL, SIMILAR} <= set(loaded.kind.tolist())
    capsys.readouterr()
    assert main(["projection", "show", str(path), *pair, "--token", "13"]) == 0
    assert ": similar strings\n" in capsys.readouterr().out
    assert main(["projection", "show", *pair, "--role", role, "--token", "<|im_start|>"]) == 0
    assert 'row of W       "<|start_header_id|>" (' in capsys.readouterr().out


def test_audit_prints_tables(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["projection", "audit", *pair]) == 0
    printed = capsys.readouterr().out
    assert "digits 2" in printed
    assert "recommendation: pkl\nbecause digits (9% of 110 tokens exact)" in printed


def test_audit_of_a_text_as_json_and_as_a_picture(
    pair: list[str], tiny_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "audit.svg"
    words = ["--text", str(tiny_world.heldout), "--json", "--plot", str(picture)]
    assert main(["projection", "audit", *pair, *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["student"]] == list(CLASSES)
    assert found["recommendation"] == "pkl"
    for side in ("student", "teacher"):
        assert sum(sum(row["text"].values()) for row in found[side]) > 100
    assert ElementTree.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize("from_file", [True, False])
def test_show_a_token_of_several_pieces(
    from_file: bool, pair: list[str], built: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["projection", "show", *([built] if from_file else []), *pair, "--token", "13"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r'student token  "13" \(\d+\): several pieces', lines[0])
    assert re.fullmatch(r'teacher pieces "1" \(\d+\), "3" \(\d+\)', lines[1])
    assert re.fullmatch(r'row of W       "1" \(\d+\) 1\.0000', lines[2])
    assert lines[3].startswith("fibre          10 other student tokens in column")
    assert '"14"' in lines[3]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "several pieces"
    assert [(one["text"], one["weight"]) for one in told["row"]] == [('"1"', 1.0)]


@pytest.mark.parametrize(
    ("token", "wanted"),
    [
        ("\\n", '"\\n"'),
        ("\\xe4", '"\\xe4"'),
        ("\\\\", '"\\\\"'),
        ("<|im_start|>", "null"),
        (" ", '" "'),
    ],
)
def test_show_escapes_bytes(
    token: str, wanted: str, pair: list[str], built: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["projection", "show", built, *pair, "--token", token]) == 0
    printed = capsys.readouterr().out
    assert wanted in printed
    assert printed.isascii()


def test_show_the_end_of_turn_by_id(
    pair: list[str], tiny_world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    eos = ChatTokenizer.load(tiny_world.student).eos_id
    assert main(["projection", "show", *pair, "--id", str(eos)]) == 0
    printed = capsys.readouterr().out
    assert f"student token  end of turn ({eos}): special" in printed
    assert "row of W       end of turn" in printed


def test_convert_imports_and_warns_40(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    indices = torch.full((552, 4), -1)
    indices[:, 0] = torch.arange(552) % 500
    weights = (indices >= 0).float()
    source, out = tmp_path / "map.pt", tmp_path / "w.safetensors"
    words = ["projection", "convert", str(source), *pair, "--out", str(out)]
    torch.save({"indices": indices, "likelihoods": weights}, source)
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "ctkd.max_length=4 ctkd.gamma=0.1" in captured.out
    indices[300] = torch.tensor([10, 11, 12, 13])
    weights[300] = torch.tensor([0.7508, 0.0751, 0.0075, 0.1667])
    torch.save({"indices": indices, "likelihoods": weights}, source)
    assert main(words) == 0
    warning = capsys.readouterr().err
    assert warning.startswith("mopd: warning: 1 rows look like NeMo's scale trick")
    assert warning.count("\n") == 1
    assert main(["projection", "show", str(out), *pair, "--id", "300"]) == 0
    assert "(10) 0.750" in capsys.readouterr().out
    assert main([*words, "--top", "2", "--no-reapply-exact"]) == 0
    capsys.readouterr()
    assert main(["projection", "show", str(out), *pair, "--id", "300"]) == 0
    assert "(10) 0.8183, " in capsys.readouterr().out  # .7508 of .7508 + .1667


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["build", "--out", "{tmp}"], "is a folder; name a file"),
        (["build", "--out", "{tmp}/w", "--max-length", "0"], "--max-length must be at least 1"),
        (["build", "--out", "{tmp}/w", "--gamma", "nan"], "--gamma at least 0"),
        (["build", "--out", "{tmp}/w", "--role", "<a>"], "--role takes '<a>=<b>'"),
        (["build", "--out", "{tmp}/w", *["--role", "a=b"] * 2], "each student token once"),
        (["build", "--out", "{tmp}/w", "--role", "<a>=b"], "has no token '<a>'"),
        (["build", "--out", "{tmp}/w", "--similarity", "{tmp}/none"], "none: no such file"),
        (
            ["build", "--out", "{tmp}/w", "--similarity", "{tmp}/junk"],
            "not readable as safetensors",
        ),
        (["convert", "{tmp}/junk", "--out", "{tmp}/w", "--top", "0"], "--top must be at least 1"),
        (["audit", "--text", "{tmp}/none"], "none: no such file"),
        (["audit", "--plot", "{tmp}/no/a.svg"], "a.svg: cannot be written (No such file"),
        (["show", "--token", "zqz"], 'is not one token of the student, which writes "z", "q"'),
        (["show", "--token", ""], "is not one token of the student\n"),
        (["show", "--id", "99999"], "the student has ids 0 to 551"),
        (["show", "{tmp}/none", "--token", "1"], "none: no such file"),
        (["show", "{tmp}/junk", "--token", "1"], "not a projection that `mopd projection build`"),
        (["convert", "{tmp}/none", "--out", "{tmp}/w"], "none: no such file"),
        (["convert", "{tmp}/junk", "--out", "{tmp}/w"], "not a readable .pt"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str],
    wanted: str,
    pair: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "junk").write_bytes(b"junk")
    given = [word.replace("{tmp}", str(tmp_path)) for word in words]
    assert main(["projection", given[0], *pair, *given[1:]]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert wanted in captured.err


@pytest.mark.parametrize(("make", "wanted"), [(False, "no such folder"), (True, "no readable")])
def test_a_folder_without_a_tokenizer(
    make: bool, wanted: str, pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    if make:
        folder.mkdir()
    assert main(["projection", "audit", *pair[:2], "--teacher", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mopd: --teacher {folder}: ")
    assert wanted in error
    assert error.count("\n") == 1


def test_a_file_of_another_pair_is_refused(
    pair: list[str], built: str, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [*pair[:2], "--teacher", pair[1]]
    assert main(["projection", "show", built, *same, "--token", "1"]) == 1
    assert "built for another teacher tokenizer" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, mopd.cli.projection as verb\n"
        "try: verb.run(['audit', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
