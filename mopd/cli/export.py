"""`mopd export RUN_DIR --output DIR`: a checkpoint as a Hugging Face model or a PEFT adapter."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mopd.cli.checkpoint import checkpoints_of
from mopd.cli.words import Parser
from mopd.errors import ArtifactError, ConfigError
from mopd.metrics.text import printable
from mopd.storage.manifest import find_latest, list_checkpoints, problem, ranked, step_name

if TYPE_CHECKING:
    from mopd.config.schema import RunConfig


def run(words: Sequence[str]) -> int:
    """One process, on the CPU, whatever layout wrote the checkpoint. The output appears whole."""
    options = parser().parse_args(words)
    try:
        return _export(options)
    except ArtifactError as error:  # the run was named on the command line
        raise ConfigError(str(error)) from error


def parser() -> argparse.ArgumentParser:
    found = Parser(
        prog="mopd export", description="Write a checkpoint as a Hugging Face model or an adapter."
    )
    found.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    which = found.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="default: the newest checkpoint")
    which.add_argument("--best", action="store_true", help="the checkpoint of the best score")
    found.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new directory")
    found.add_argument(
        "--format",
        choices=("hf", "peft"),
        default="hf",
        help="hf: the model, adapters added to it (default); peft: the adapter alone",
    )
    found.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="default: the run's; float32 of a bfloat16 run takes the optimizer's main weights",
    )
    found.add_argument("--model", type=Path, metavar="DIR", help="student.model, if it has moved")
    found.add_argument("--json", action="store_true", help="print what was written as JSON")
    return found


def _export(options: argparse.Namespace) -> int:
    config = _config(options)
    path = find_checkpoint(options.run_dir, step=options.step, best=options.best)
    _refuse_output(options.output)
    trouble = problem(path, contents=config.checkpoint.verify)
    if trouble is not None:
        others = [info.step for info in list_checkpoints(path.parent) if info.path != path]
        remedy = f"try --step {others[-1]}" if others else "there is no other"
        raise ConfigError(f"{trouble}; this checkpoint is damaged, {remedy}")

    # After everything that can be refused at once: these bring torch and megatron in.
    from mopd.student.adapter_io import save_peft
    from mopd.student.export import model_of
    from mopd.student.hf_export import save_hf
    from mopd.student.model import DTYPES

    dtype = options.dtype or config.student.dtype
    source = str(config.student.model)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with model_of(path, config.student, dtype=DTYPES[dtype]) as model:
        if options.format == "peft":
            save_peft(model, options.output, base_dir=source, dtype=DTYPES[dtype])
        else:
            save_hf(model, options.output, source_dir=source, dtype=DTYPES[dtype])
    what = "adapter" if options.format == "peft" else "model"
    if options.json:
        said = {"output": options.output, "checkpoint": path, "format": options.format}
        print(json.dumps({**{key: str(each) for key, each in said.items()}, "dtype": dtype}))
    else:
        print(printable(f"{options.output}: {what} of {path}, {dtype}"))
    return 0


def _config(options: argparse.Namespace) -> RunConfig:
    from mopd.config.load import load_config

    path = options.run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{options.run_dir} is no run: it has no config.yaml; name one that has")
    config = load_config(path)
    if options.model is not None:
        student = config.student.model_copy(update={"model": str(options.model)})
        config = config.model_copy(update={"student": student})
    if not (Path(str(config.student.model)) / "config.json").is_file():
        raise ConfigError(
            f"student.model={config.student.model}: no such model here, and its config.json and "
            "tokenizer are needed; tell with --model where it is now"
        )
    if options.format == "peft" and config.student.lora.rank is None:
        raise ConfigError(
            f"--format peft: {options.run_dir} trained the model itself (student.lora.rank is "
            "null) and has no adapter; use --format hf"
        )
    return config


def find_checkpoint(run_dir: Path, *, step: int | None, best: bool) -> Path:
    """That of ``step``, the best, or the newest.

    Raises:
        ConfigError: there is none.
    """
    directory = checkpoints_of(run_dir)
    infos = list_checkpoints(directory)
    if step is not None:
        path = directory / step_name(step)
        if not path.is_dir():
            steps = ", ".join(str(info.step) for info in infos) or "none"
            raise ConfigError(f"--step {step}: no such checkpoint; there are {steps}")
        return path
    if best:
        found = ranked(infos)
        if not found:
            raise ConfigError(
                f"--best: no checkpoint of {run_dir} has a score; name a --step, or train "
                "with evaluate.interval and checkpoint.keep_best"
            )
        return found[0].path
    newest = find_latest(directory)
    if newest is None:
        raise ConfigError(f"{directory} has no checkpoint yet; name a run that has saved one")
    return newest


def _refuse_output(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"--output {path}: is there already; name a new directory")
