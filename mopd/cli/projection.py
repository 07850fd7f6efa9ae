"""`mopd projection build | audit | show | convert`: W of two tokenizers, without a model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopd.cli.words import Parser
from mopd.config.schema import CtkdSection
from mopd.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from mopd.projection import Projection, ProjectionOptions
    from mopd.projection.audit import Audit, Coverage, Reach, TeacherClass
    from mopd.tokens.vocabulary import Vocabulary


def run(words: Sequence[str]) -> int:
    """Parse, import what the verb needs, run it. Files and folders are local."""
    options = parser().parse_args(words)
    return options.run(options)


def parser() -> argparse.ArgumentParser:
    found = Parser(
        prog="mopd projection", description="The projection of two tokenizers; no model is read."
    )
    verbs = found.add_subparsers(dest="verb", metavar="VERB", required=True)
    pair = Parser(add_help=False)
    pair.add_argument("--student", type=Path, required=True, metavar="DIR")
    pair.add_argument("--teacher", type=Path, required=True, metavar="DIR")
    for side in ("student", "teacher"):
        pair.add_argument(f"--{side}-eos", metavar="TOKEN", help=f"the recipe's {side} eos_token")
    ctkd = CtkdSection()
    shape = Parser(add_help=False)
    shape.add_argument("--max-length", type=int, default=ctkd.max_length, metavar="N")
    shape.add_argument("--gamma", type=float, default=ctkd.gamma, metavar="G")
    shape.add_argument("--map", choices=("pieces", "exact"), default="pieces")
    shape.add_argument(
        "--role", action="append", default=[], metavar="'<A>=<B>'", help="control tokens that pair"
    )
    shape.add_argument(
        "--similarity", type=Path, metavar="FILE", help="embeddings of both sides' token strings"
    )

    build = verbs.add_parser("build", parents=[pair, shape], help="build W and keep it in a file")
    build.add_argument("--out", type=Path, required=True, metavar="FILE")
    build.add_argument("--json", action="store_true", help="print what was written as JSON")
    build.set_defaults(run=_build)
    audit = verbs.add_parser("audit", parents=[pair], help="coverage by class of characters")
    audit.add_argument("--text", type=Path, metavar="FILE", help="a sample: .jsonl or plain text")
    audit.add_argument("--json", action="store_true", help="print JSON instead of tables")
    audit.add_argument("--plot", type=Path, metavar="FILE.svg", help="write a picture")
    audit.set_defaults(run=_audit)
    show = verbs.add_parser("show", parents=[pair, shape], help="what a student token maps to")
    show.add_argument("file", type=Path, nargs="?", metavar="FILE", help="else W is built")
    token = show.add_mutually_exclusive_group(required=True)
    token.add_argument("--token", metavar="TEXT", help=r"its text; escapes like \n or \xe4 work")
    token.add_argument("--id", type=int, metavar="ID")
    show.add_argument("--json", action="store_true", help="print its row of W as JSON")
    show.set_defaults(run=_show)
    convert = verbs.add_parser("convert", parents=[pair], help="import a NeMo-RL top-k .pt file")
    convert.add_argument("file", type=Path, metavar="FILE.pt")
    convert.add_argument("--out", type=Path, required=True, metavar="FILE")
    convert.add_argument("--top", type=int, metavar="K", help="entries of a row that stay")
    convert.add_argument(
        "--reapply-exact",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="one-hot rows for tokens of equal bytes, whatever the file says",
    )
    convert.add_argument("--json", action="store_true", help="print what was written as JSON")
    convert.set_defaults(run=_convert)
    return found


def _build(options: argparse.Namespace) -> int:
    shape = _shape(options)
    student, teacher = _vocabularies(options)
    begin = time.perf_counter()
    projection = _built(student, teacher, shape)
    _save(options, projection, shape=shape, seconds=time.perf_counter() - begin)
    return 0


def _convert(options: argparse.Namespace) -> int:
    _need_file(options.file)
    if options.top is not None and options.top < 1:
        raise ConfigError("--top must be at least 1")
    student, teacher = _vocabularies(options)
    begin = time.perf_counter()
    from mopd.projection.describe import quoted
    from mopd.projection.nemo import NEMO_OPTIONS, import_topk, load_topk

    try:
        found = import_topk(
            load_topk(options.file),
            student=student,
            teacher=teacher,
            reapply_exact=options.reapply_exact,
            top=options.top or NEMO_OPTIONS.max_length,
        )
    except ArtifactError as error:
        # The file and both tokenizers were named on the command line.
        raise ConfigError(str(error)) from error
    if len(found.scaled_rows):
        some = ", ".join(quoted(student.token_bytes[i]) for i in found.scaled_rows[:3].tolist())
        print(
            f"mopd: warning: {len(found.scaled_rows)} rows look like NeMo's scale trick: 1/6 of "
            f"the row sits on an arbitrary token ({some}); `mopd projection build` has none of it",
            file=sys.stderr,
        )
    seconds = time.perf_counter() - begin
    _save(options, found.projection, shape=NEMO_OPTIONS, seconds=seconds)
    if options.json:
        return 0
    print(
        f"recipes use it with ctkd.max_length={NEMO_OPTIONS.max_length} "
        f"ctkd.gamma={NEMO_OPTIONS.gamma}"
    )
    return 0


def _audit(options: argparse.Namespace) -> int:
    if options.text is not None:
        _need_file(options.text)
    student, teacher = _vocabularies(options)
    from rich.console import Console

    from mopd.projection import ProjectionOptions, build_projection
    from mopd.projection.audit import audit, read_texts
    from mopd.projection.plot import plot_audit

    # The kinds of rows, the fold and the fibres do not depend on gamma.
    defaults = CtkdSection()
    shape = ProjectionOptions(max_length=defaults.max_length, gamma=defaults.gamma)
    texts = read_texts(options.text) if options.text is not None else []
    found = audit(student, teacher, build_projection(student, teacher, shape), texts=texts)
    if options.plot is not None:
        _write_text(options.plot, plot_audit(found))
    if options.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        _print_audit(found, Console())
    return 0


def _print_audit(found: Audit, console: Console) -> None:
    from rich.table import Table

    table = Table(title="Student tokens: what their row is", title_justify="left")
    table.add_column("class")
    for name in ("tokens", "exact", "multi", "null", "fibre", "text", "exact"):
        table.add_column(name, justify="right")
    for row in found.student:
        if row.tokens.total:
            table.add_row(row.name, *_cells(row.tokens), str(row.fibre), *_text_cells(row.text))
    table.add_section()
    fibre = sum(row.fibre for row in found.student)
    table.add_row("all", *_cells(found.overall()), str(fibre), *_text_cells(found.overall_text()))
    console.print(table)

    table = Table(title="Teacher tokens: the column that stands for them", title_justify="left")
    table.add_column("class")
    for name in ("tokens", "exact", "own", "folded", "null", "text", "folded", "null"):
        table.add_column(name, justify="right")
    for side in found.teacher:
        if side.tokens.total:
            table.add_row(*_reach_cells(side))
    table.add_section()
    table.add_row(*_reach_cells(found.reach()))
    console.print(table)
    console.print(f"recommendation: {found.recommendation}", highlight=False)
    console.print(f"because {found.reason}", highlight=False, markup=False)


def _show(options: argparse.Namespace) -> int:
    shape = _shape(options)
    if options.file is not None:
        _need_file(options.file)
    student, teacher = _vocabularies(options)
    from mopd.projection.describe import token_lines, token_row
    from mopd.projection.store import load_projection

    token = _find_token(student, options)
    if options.file is None:
        projection = _built(student, teacher, shape)
    else:
        _need_projection(options.file)
        projection = load_projection(options.file, student=student, teacher=teacher, options=None)
    if options.json:
        print(json.dumps(token_row(token, teacher=teacher, projection=projection)))
        return 0
    for line in token_lines(token, student=student, teacher=teacher, projection=projection):
        print(line)
    return 0


def _find_token(student: Vocabulary, options: argparse.Namespace) -> int:
    from mopd.projection.describe import listed, quoted

    if options.id is not None:
        if not 0 <= options.id < student.size:
            raise ConfigError(f"--id {options.id}: the student has ids 0 to {student.size - 1}")
        return options.id
    plain = options.token.encode(errors="surrogateescape")
    for data in (plain, _unescaped(options.token)):
        if data and (found := student.by_bytes.get(data)) is not None:
            return found
        if data and data in student.token_bytes:  # a control token by its text
            return student.token_bytes.index(data)
    names = [quoted(student.token_bytes[i]) for i in student.encode(plain)]
    raise ConfigError(
        f"--token {quoted(plain)} is not one token of the student"
        + (f", which writes {listed(names)}" if names else "")
    )


def _unescaped(text: str) -> bytes | None:
    r"""Bytes of a text with escapes such as ``\n`` and ``\xe4``; None where they are broken."""
    try:
        return text.encode("latin-1", "backslashreplace").decode("unicode_escape").encode("latin-1")
    except UnicodeError:
        return None


def _cells(coverage: Coverage | Reach) -> list[str]:
    return [str(coverage.total), *(f"{share:.1%}" for share in coverage.shares())]


def _text_cells(coverage: Coverage | None) -> list[str]:
    if coverage is None or not coverage.total:
        return ["-", "-"]
    return [str(coverage.total), f"{coverage.shares()[0]:.1%}"]


def _reach_cells(side: TeacherClass) -> list[str]:
    count, *shares = _cells(side.tokens)
    text = ["-", "-", "-"]
    if side.text is not None and side.text.total:
        text = [str(side.text.total), *(f"{share:.1%}" for share in side.text.shares()[1:])]
    return [side.name, count, f"{side.exact_share:.1%}", *shares, *text]


def _shape(options: argparse.Namespace) -> ProjectionOptions:
    if options.max_length < 1 or not options.gamma >= 0:
        raise ConfigError("--max-length must be at least 1, --gamma at least 0")
    pairs = [role.partition("=") for role in options.role]
    if len({mine for mine, _, _ in pairs}) < len(pairs) or not all(b for _, _, b in pairs):
        raise ConfigError("--role takes '<a>=<b>', and each student token once")
    if options.similarity is not None:
        _need_file(options.similarity)
    from mopd.projection import ProjectionOptions, Similarity

    return ProjectionOptions(
        max_length=options.max_length,
        gamma=options.gamma,
        map=options.map,
        roles={mine: theirs for mine, _, theirs in pairs},
        similarity=Similarity.of(options.similarity) if options.similarity is not None else None,
    )


def _built(student: Vocabulary, teacher: Vocabulary, shape: ProjectionOptions) -> Projection:
    from mopd.projection import build_projection

    try:
        return build_projection(student, teacher, shape)
    except ArtifactError as error:
        # The embeddings and both tokenizers were named on the command line.
        raise ConfigError(str(error)) from error


def _vocabularies(options: argparse.Namespace) -> tuple[Vocabulary, Vocabulary]:
    return (
        _vocabulary("--student", options.student, options.student_eos),
        _vocabulary("--teacher", options.teacher, options.teacher_eos),
    )


def _vocabulary(flag: str, path: Path, eos_token: str | None) -> Vocabulary:
    """Read as a run reads it, so that fingerprints agree; no code of the folder is run."""
    if not path.is_dir():
        raise ConfigError(f"{flag} {path}: no such folder; name one with a tokenizer.json")
    from transformers import AutoTokenizer

    from mopd.tokens.vocabulary import Vocabulary

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{flag} {path}: holds no readable tokenizer ({reason})") from error
    return Vocabulary.from_tokenizer(tokenizer, eos_token=eos_token)


def _save(
    options: argparse.Namespace,
    projection: Projection,
    *,
    shape: ProjectionOptions,
    seconds: float,
) -> None:
    from mopd.projection.store import save_projection
    from mopd.types import EXACT, SPECIAL

    path: Path = options.out
    if path.is_dir():
        raise ConfigError(f"--out {path}: is a folder; name a file")
    try:
        save_projection(path, projection, options=shape)
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be written ({error.strerror})") from error
    exact = int(((projection.kind == EXACT) | (projection.kind == SPECIAL)).sum())
    if options.json:
        said = {
            "path": str(path),
            "bytes": path.stat().st_size,
            "student_size": projection.student_size,
            "teacher_size": projection.teacher_size,
            "weights": len(projection.col),
            "exact": exact,
            "seconds": seconds,
        }
        print(json.dumps(said))
        return
    print(
        f"{path}: {path.stat().st_size / 1e6:.2f} MB, {projection.student_size} x "
        f"{projection.teacher_size}, {len(projection.col)} weights, "
        f"{exact / projection.student_size:.1%} exact, {seconds:.1f} s"
    )


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error


def _need_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")


def _need_projection(path: Path) -> None:
    """Named on the command line, so a file of another kind is the user's mistake."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as file:
            kind = (file.metadata() or {}).get("format", "")
    except (OSError, SafetensorError):
        kind = ""
    if not kind.startswith("mopd-projection"):
        raise ConfigError(f"{path}: not a projection that `mopd projection build` wrote")
