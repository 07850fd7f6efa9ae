"""`mopd score --teacher NAME recipe=<name> FILE`: texts through one teacher of a recipe.

Exit codes: 0 scored, 1 a teacher failed or a replay differs, 2 the command or the recipe is wrong.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopd.cli.table import table
from mopd.cli.words import Parser, add_words, parse, said_aside
from mopd.errors import ConfigError
from mopd.metrics.text import json_line, printable

if TYPE_CHECKING:
    from mopd.config.schema import RunConfig
    from mopd.runtime.score import Scored, ScoredText
    from mopd.tokens.vocabulary import Vocabulary

TOLERANCE = 1e-6  # relative, between a step and its replay


def parser() -> argparse.ArgumentParser:
    found = Parser(
        prog="mopd score",
        description="Score texts by one teacher of a recipe: log-probabilities of its tokens, their"
        " alignment with the student's, and the loss of the student as it is. One word without `=` "
        "is FILE: JSON lines with messages and an answer, or with --prompt one answer a line.",
    )
    add_words(found)
    found.add_argument("--teacher", metavar="NAME", help="by its name under teachers")
    found.add_argument("--prompt", metavar="TEXT", help="FILE has plain answers to this prompt")
    found.add_argument(
        "--model", type=Path, metavar="DIR", help="the student; default: the recipe's"
    )
    found.add_argument("--json", action="store_true", help="print one JSON object for each text")
    found.add_argument("--output", type=Path, metavar="FILE", help="write these objects to a file")
    found.add_argument(
        "--replay",
        type=Path,
        metavar="DUMP",
        help="instead: compute the losses of a debug.dump_step again, and compare",
    )
    return found


def run(words: Sequence[str]) -> int:
    """One process, on the recipe's device."""
    options, rest = parse(parser(), words)
    if options.replay is not None:
        if rest:
            raise ConfigError(f"--replay: a dump has its own recipe; drop `{printable(rest[0])}`")
        return _replay(options.replay, as_json=options.json)
    files = [word for word in rest if "=" not in word]
    if len(files) != 1:
        raise ConfigError(
            f"expected one FILE beside recipe=<name>, got {', '.join(files) or 'none'}; "
            "see mopd score --help"
        )
    if options.teacher is None:
        raise ConfigError("--teacher: is not set; name one of the recipe's teachers")
    if not Path(files[0]).is_file():
        raise ConfigError(f"{files[0]}: no such file; name JSON lines, or plain text with --prompt")
    config = _config([word for word in rest if "=" in word], model=options.model)
    with tempfile.TemporaryDirectory(prefix="mopd-score-") as directory:
        return _score(config, Path(files[0]), options, Path(directory))


def _config(words: Sequence[str], *, model: Path | None) -> RunConfig:
    from mopd.config.check import check_config
    from mopd.config.load import load_config, parse_arguments
    from mopd.demo.fill import WorldFill
    from mopd.runtime.demand import student_ranks

    recipe, overrides = parse_arguments(words)
    if model is not None:
        overrides = [*overrides, f"student.model={model}"]
    config = load_config(recipe, overrides, fill=WorldFill(announce=False))
    check_config(config, world_size=student_ranks(config))
    return config


def _score(config: RunConfig, file: Path, options: argparse.Namespace, directory: Path) -> int:
    from mopd.runtime.score import for_one_teacher, score_texts, scoring_run, write_rows

    if options.prompt is not None:
        texts = _answers(file)
        data = write_rows(directory / "rows.jsonl", texts, prompt=options.prompt, data=config.data)
        config = config.model_copy(update={"data": data})
        file = directory / "rows.jsonl"
    config = for_one_teacher(config, options.teacher, data=file, directory=directory)
    with said_aside(options.json), scoring_run(config) as run:
        found = score_texts(run)
        assert run.pool is not None
        vocabulary = run.tokenizer.vocabulary
        its = run.pool.teachers[options.teacher].tokenizer.vocabulary
    objects = [as_json(text, vocabulary, its) for text in found.texts]
    lines = [json_line(one) for one in objects]
    if options.output is not None:
        try:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--output {options.output}: {error.strerror}; name another file"
            ) from error
    if options.json:
        print("\n".join(lines))
    else:
        _print(found, objects)
        if options.output is not None:
            print(f"{options.output}: {len(lines)} texts")
    return 0


def _answers(file: Path) -> list[str]:
    try:
        found = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is not UTF-8 text; save it as that") from None
    if not found:
        raise ConfigError(f"{file}: is empty; write one answer a line")
    return found


def as_json(text: ScoredText, student: Vocabulary, teacher: Vocabulary) -> dict[str, Any]:
    """Token texts are escaped bytes; numbers that nobody has are null."""
    from mopd.projection.describe import quoted

    def side(vocabulary: Vocabulary, ids: Any, logprobs: Any) -> list[dict[str, Any]]:
        return [
            {
                "id": int(i),
                "text": "end of turn"
                if i == vocabulary.eos_id
                else quoted(vocabulary.token_bytes[i]),
                "logprob": float(p) if math.isfinite(p) else None,
            }
            for i, p in zip(ids.tolist(), logprobs.tolist(), strict=True)
        ]

    rollout, scores = text.rollout, text.scores
    return {
        "id": rollout.prompt.id,
        "domain": rollout.prompt.domain,
        "response": rollout.response.decode("utf-8", "replace"),
        "truncated": rollout.finish_reason == "length",
        "loss": text.loss,
        "metrics": dict(text.metrics),
        "aligned": 0 if text.alignment is None else text.alignment.covered,
        "student_tokens": side(student, rollout.token_ids, text.student_logprobs),
        "teacher_tokens": []
        if scores is None
        else side(teacher, scores.token_ids, scores.logprobs),
        "chunks": [
            {
                "kind": chunk.kind,
                "kept": chunk.kept,
                "student": list(chunk.student),
                "teacher": list(chunk.teacher),
                "student_logprob": chunk.student_logprob,
                "teacher_logprob": chunk.teacher_logprob
                if math.isfinite(chunk.teacher_logprob)
                else None,
            }
            for chunk in text.chunks()
        ],
    }


def _print(found: Scored, objects: Sequence[Mapping[str, Any]]) -> None:
    for one in objects:
        size = len(one["student_tokens"])
        cut = ", cut at rollout.max_new_tokens" if one["truncated"] else ""
        print(
            printable(
                f"{one['id']} ({one['domain']}): {_named(one['loss'], one['metrics'])}; "
                f"{one['aligned']} of {size} tokens aligned{cut}"
            )
        )
        rows = [("chunk", "student", "log p", "teacher", "log p", "of its tokens")]
        for chunk in one["chunks"]:
            ours = one["student_tokens"][slice(*chunk["student"])]
            theirs = one["teacher_tokens"][slice(*chunk["teacher"])]
            rows.append(
                (
                    chunk["kind"] if chunk["kept"] else f"{chunk['kind']} left out",
                    " ".join(token["text"] for token in ours),
                    _number(chunk["student_logprob"]),
                    " ".join(token["text"] for token in theirs),
                    _number(chunk["teacher_logprob"]),
                    " ".join(_number(token["logprob"]) for token in theirs),
                )
            )
        print(table(rows, right=(2, 4)))
        print()
    print(f"{len(objects)} texts, as one step has them: {_named(found.loss, found.metrics)}")


def _named(loss: float | None, metrics: Mapping[str, float | None]) -> str:
    if not metrics:
        return "no loss (a policy gradient needs the sampler's log-probabilities)"
    parts = {"loss": loss, **metrics}
    return ", ".join(f"{name} {_number(value, 6)}" for name, value in parts.items())


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # no -0.000


def _replay(directory: Path, *, as_json: bool) -> int:
    if not directory.is_dir():
        raise ConfigError(f"--replay {directory}: no such directory; name <run>/dump-<step>")
    from mopd.runtime.dump import replay

    found = replay(directory)
    names = sorted({*found.recorded, *found.computed})
    pairs = {name: (found.recorded.get(name), found.computed.get(name)) for name in names}
    wrong = [name for name, pair in pairs.items() if differ(*pair)]
    if as_json:
        said = {
            "recorded": dict(found.recorded),
            "computed": dict(found.computed),
            "largest_difference": found.largest_difference,
            "differ": wrong,
        }
        print(json_line(said))
        return 1 if wrong else 0
    rows = [("name", "recorded", "computed", "")]
    for name, pair in pairs.items():
        one, two = ("-" if value is None else f"{value:.9g}" for value in pair)
        rows.append((name, one, two, "DIFFERS" if name in wrong else ""))
    print(table(rows, right=(1, 2)))
    print(
        f"{directory}: largest difference {found.largest_difference:.3g}"
        + (f"; {len(wrong)} above {TOLERANCE:g}" if wrong else "")
    )
    return 1 if wrong else 0


def differ(one: float | None, two: float | None) -> bool:
    """By more than `TOLERANCE`, relative to the larger; a number that one side lacks differs."""
    if one is None or two is None:
        return True
    if math.isnan(one) or math.isnan(two):
        return math.isnan(one) != math.isnan(two)
    return not math.isclose(one, two, rel_tol=TOLERANCE, abs_tol=1e-12)
