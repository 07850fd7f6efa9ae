"""`mopd eval recipe=<name> [--model DIR | --run RUN [--step N]]`: a student on held-out prompts.

Exit codes: 0 measured, 1 a teacher or an artifact failed, 2 the command or the recipe is wrong.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mopd.cli.table import table
from mopd.cli.words import Parser, add_words, parse, said_aside
from mopd.errors import ArtifactError, ConfigError
from mopd.metrics.text import json_line, printable

if TYPE_CHECKING:
    from mopd.config.schema import RunConfig
    from mopd.runtime.evaluation import Evaluation


def parser() -> argparse.ArgumentParser:
    found = Parser(
        prog="mopd eval",
        description="Greedy accuracy on held-out prompts, and the share of answers in the student's"
        " own segmentation, domain by domain.",
    )
    add_words(found)
    which = found.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, metavar="DIR", help="default: the recipe's student")
    which.add_argument("--run", type=Path, metavar="RUN_DIR", help="its hf/, and its own recipe")
    found.add_argument("--step", type=int, metavar="N", help="of --run: a checkpoint, not hf/")
    found.add_argument(
        "--loss",
        action="store_true",
        help="also load the teachers: validation loss, and with evaluate.interval their divergence",
    )
    found.add_argument("--json", action="store_true", help="print one JSON object")
    return found


def run(words: Sequence[str]) -> int:
    options, rest = parse(parser(), words)
    if options.step is not None and options.run is None:
        raise ConfigError("--step: is of a run's checkpoints; name it with --run")
    config = _config(rest, options.run)
    if options.loss:
        _refuse_losses(config)
    with (
        tempfile.TemporaryDirectory(prefix="mopd-eval-") as temporary,
        _model(config, options, Path(temporary)) as model,
    ):
        from mopd.runtime.measure import accuracies, measured_recipe, with_losses

        config = measured_recipe(config, model, directory=Path(temporary))
        with said_aside(options.json):
            found = with_losses(config) if options.loss else accuracies(config)
        _show(found, model, as_json=options.json)
    return 0


def _refuse_losses(config: RunConfig) -> None:
    if config.data.validation_path is None:
        raise ConfigError("--loss: data.validation_path is not set; name rows with answers")
    own = [name for name, one in config.teachers.items() if one.backend.type == "self"]
    if own:
        raise ConfigError(
            f"--loss: teachers.{own[0]} is the student before it learned (backend.type=self), "
            "which the measured model no longer is; leave --loss out"
        )


def _config(words: Sequence[str], run_dir: Path | None) -> RunConfig:
    from mopd.config.check import check_config
    from mopd.config.load import load_config, parse_arguments
    from mopd.demo.fill import WorldFill
    from mopd.runtime.demand import student_ranks

    if run_dir is not None and not any(word.startswith("recipe=") for word in words):
        path = run_dir / "config.yaml"
        if not path.is_file():
            raise ConfigError(f"--run {run_dir}: is no run: it has no config.yaml; name one")
        words = [f"recipe={path}", *words]
    recipe, overrides = parse_arguments(words)
    config = load_config(recipe, overrides, fill=WorldFill(announce=False))
    check_config(config, world_size=student_ranks(config))
    return config


@contextmanager
def _model(config: RunConfig, options: argparse.Namespace, temporary: Path) -> Iterator[Path]:
    """The directory that is measured: named, of a finished run, or written from a checkpoint."""
    if options.run is None:
        model = options.model or Path(str(config.student.model))
        if not (model / "config.json").is_file():
            raise ConfigError(f"--model {model}: holds no model (config.json); name another")
        yield model
        return
    if options.step is None and (options.run / "hf" / "config.json").is_file():
        yield options.run / "hf"
        return
    from mopd.cli.export import find_checkpoint
    from mopd.student.export import model_of
    from mopd.student.hf_export import save_hf
    from mopd.student.model import DTYPES

    try:
        path = find_checkpoint(options.run, step=options.step, best=False)
        dtype = DTYPES[config.student.dtype]
        with model_of(path, config.student, dtype=dtype) as model:
            source = str(config.student.model)
            save_hf(model, temporary / path.name, source_dir=source, dtype=dtype)
    except ArtifactError as error:  # the run was named on the command line
        raise ConfigError(str(error)) from error
    yield temporary / path.name


def _show(found: Evaluation, model: Path, *, as_json: bool) -> None:
    if as_json:
        print(json_line({"model": str(model), "domains": found.scores, **found.line}))
        return
    if found.scores:
        rows = [("domain", "prompts", "accuracy", "", "canonical")]
        for name, score in found.scores.items():
            share, count = score["accuracy"], score["prompts"]
            error = math.sqrt(share * (1 - share) / count)
            rows.append(
                (
                    name,
                    f"{count:.0f}",
                    f"{share:.1%}",
                    f"+- {error:.1%}",
                    f"{score['canonical']:.1%}",
                )
            )
        print(table(rows, right=(1, 2, 4)))
    for name, value in found.metrics.items():
        print(printable(f"{name} {value:.6g}"))
    print(printable(str(model)))
