"""Every command of the documentation is run; what cannot be run here is checked."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from mopd.demo import World
from tests.helpers.doc_commands import SHELL, check_unrun, commands, is_training, with_suffix
from tests.helpers.doc_shell import Ended, make_scratch, run_command, run_python
from tests.helpers.markdown import Fence, name_of, pages, read_fences
from tests.helpers.runs import ROOT

# Behind the words of every training on a page: the same run, made short.
SUFFIX = [
    "run.threads=1",
    "train.steps=4",
    "train.num_prompts_per_step=8",
    "train.micro_batch_size=8",
    "checkpoint.save_interval=2",
    "evaluate.max_prompts_per_domain=8",
    "evaluate.kl_prompts_per_domain=2",
    "evaluate.fail_if_not_learned=false",
]
# Of single commands: what is written there -> what is run instead.
INSTEAD = {
    ("README.md", "--step 450"): "--step 2",
    ("docs/tutorial.md", "--step 400"): "--step 2",
}
# Trainings that must go on for a while: they are killed on the way.
LONGER = {"docs/tutorial.md": ("run.name=killed", "train.steps=40")}
INFOS = {"sh", "text", "python", "yaml", "json", "{eval-rst}", "{toctree}", "{include}", "{keys}"}
PAGES = {name_of(page): page for page in pages()}


def test_every_block_says_what_it_is() -> None:
    unknown = {
        f"{fence.where}: {fence.info or 'nothing'}"
        for page in PAGES.values()
        for fence in read_fences(page)
        if fence.info not in INFOS
    }
    assert not unknown


def runs_of(name: str) -> list[Fence]:
    kinds = ("sh", "python")
    return [f for f in read_fences(PAGES[name]) if f.info in kinds and "not run" not in f.remarks]


@pytest.mark.parametrize("name", sorted(name for name in PAGES if runs_of(name)))
@pytest.mark.timeout(400)
def test_the_commands_of_a_page_in_order(name: str, world: World, tmp_path: Path) -> None:
    scratch = make_scratch(tmp_path, world)
    blocks: list[str] = []
    for fence in read_fences(PAGES[name]):
        if "file" in fence.remarks:
            (scratch / fence.remarks["file"]).write_text(fence.text)
        elif "not run" not in fence.remarks and fence.info in ("sh", "python"):
            run_fence(fence, scratch, blocks)
            if fence.info == "python":
                blocks.append(fence.text)


def run_fence(fence: Fence, scratch: Path, blocks: Sequence[str] = ()) -> None:
    """Runs a block and compares how it ends, and what it writes with what the page shows."""
    wanted = int(fence.remarks.get("exit code", "0"))
    if fence.info == "python":
        steps = [(fence.text, run_python(fence.text, scratch, before=blocks))]
    else:
        lines = [shortened(fence.page, one, scratch) for one in commands(fence)]
        if any(line.rstrip().endswith("&") for line in lines):
            lines = ["\n".join(lines)]  # a background job lives in its own shell
        steps = [(line, run_command(line, scratch)) for line in lines]
    for number, (line, ended) in enumerate(steps, 1):
        code = wanted if number == len(steps) else 0
        assert ended.code == code, f"{fence.where}: `{line}` ended with {told(ended)}"
    if fence.output is not None:
        compare(fence, "\n".join(ended.output for _, ended in steps))


def told(ended: Ended) -> str:
    return f"exit code {ended.code}:\n{ended.output[-3000:]}"


def shortened(page: str, command: str, scratch: Path) -> str:
    """The command as it is run: what make would do, with the suffix behind a training."""
    for (where, written), instead in INSTEAD.items():
        if where == page:
            command = command.replace(written, instead)
    if command.startswith("make train"):
        command = what_make_does(command, scratch)
    if not is_training(command):
        return command
    suffix = [*SUFFIX]
    if page in LONGER and LONGER[page][0] in command:
        suffix.append(LONGER[page][1])
    return with_suffix(command, suffix)


def what_make_does(command: str, scratch: Path) -> str:
    """The training that a `make train` ends in; the set-up before it is there already."""
    dry = command.replace("make ", "make --dry-run --old-file .venv/.mopd-setup ", 1)
    said = subprocess.run(dry, shell=True, cwd=scratch, capture_output=True, text=True, check=True)
    return next(line for line in said.stdout.splitlines() if is_training(line))


RULES = str.maketrans("│┃", "||")


def shape(line: str) -> str:
    """A line with its numbers and the width and frame of its columns left open."""
    line = line.translate(RULES).strip()
    if re.fullmatch(r"[-+┏┓┗┛┡┩├┤┼━─┳┻╇┴┬┌┐└┘└ ]+", line):
        return "a rule"
    line = re.sub(r"(?<![\w.])-?\d+(:\d\d)*([.,]\d+)*(e[-+]\d+)?%?", "#", line)
    return re.sub(r"\s+", " ", line)


def compare(fence: Fence, written: str) -> None:
    """Every shown line stands in the output, in this order; `...` is anything.

    Lines are compared by their shape, those of an error as they are.
    """
    assert fence.output is not None
    found, place = [line.rstrip() for line in written.splitlines()], 0
    for line in fence.output.splitlines():
        parts = [re.escape(shape(part)) for part in line.split("...")]
        pattern = re.compile(".*".join(parts))
        if not line.strip() or line.strip() == "...":
            continue
        if line.startswith("error: "):
            assert line in found, f"{fence.where}: `{line}` is not in:\n{written[-3000:]}"
            continue
        hits = [n for n, one in enumerate(found) if n >= place and pattern.fullmatch(shape(one))]
        assert hits, f"{fence.where}: nothing like `{line}` in:\n{written[-3000:]}"
        place = hits[0]


@pytest.mark.parametrize("name", sorted(PAGES))
def test_what_is_not_run_is_right_all_the_same(name: str) -> None:
    """Recipes load and pass their checks, verbs know their options, files are there."""
    for fence in read_fences(PAGES[name]):
        if "not run" not in fence.remarks:
            continue
        reason = fence.remarks["not run"]
        assert len(reason) >= 5, f"{fence.where}: says no reason"
        for test in re.findall(r"(?:tests|docs)/[\w/.]+\w", reason):
            assert (ROOT / test).exists(), f"{fence.where}: {test} is not there"
        if fence.info == "python":
            ast.parse(fence.text.replace("for ...]", "for one in many]"))
            continue
        for command in commands(fence):
            try:
                check_unrun(command)
            except Exception as error:
                raise AssertionError(f"{fence.where}: `{command}`: {error}") from error


def test_make_knows_its_targets() -> None:
    """`make x` in any page is a target of the Makefile."""
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES.values():
        named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(), re.M))
        assert named <= known, f"{name_of(page)}: make {sorted(named - known)}"


def test_a_shell_is_seen() -> None:
    assert SHELL.search("a > b") and SHELL.search("sleep 3 &") and not SHELL.search("mopd plan")
