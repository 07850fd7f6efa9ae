"""`mopd study FILE`: run many recipes and seeds, and put them side by side."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mopd.cli.words import Parser
from mopd.errors import ConfigError
from mopd.metrics.text import printable


def run(words: Sequence[str]) -> int:
    """Run what is missing, then write the tables. 0 all done, 1 a run failed, 2 wrong file."""
    options = parser().parse_args(words)
    if options.jobs < 1:
        raise ConfigError(f"--jobs: {options.jobs} runs at a time; give 1 or more")
    if options.document is not None and not options.document.is_file():
        raise ConfigError(f"--document {options.document}: does not exist; create it")

    # After parsing: these bring the schema in.
    from mopd.demo.fill import WorldFill
    from mopd.study.results import Raw
    from mopd.study.run import Options, run_jobs
    from mopd.study.settings import Defaults
    from mopd.study.spec import jobs_of, load_study
    from mopd.study.write import write_tables

    study = load_study(options.file)
    names = study.chosen(options.only)
    output = options.output or options.runs / f"study-{study.name}"
    say = sys.stderr if options.json else sys.stdout
    fill = WorldFill(announce=not options.json)
    jobs = [] if options.tables else jobs_of(study, names, fill=fill, extra=tuple(options.set))
    raw = Raw(output / "raw.jsonl")
    bad = 0
    if jobs:
        try:
            bad = run_jobs(
                jobs,
                raw,
                Defaults(output / "defaults.json"),
                Options(
                    work=options.runs / f"study-{study.name}",
                    num_jobs=options.jobs,
                    limit_s=study.limit_s,
                    keep=options.keep,
                    report=lambda line: print(printable(line), file=say, flush=True),
                ),
            )
        except KeyboardInterrupt:
            print("interrupted; the same command goes on", file=sys.stderr)
            return 130
    raw.tidy(study.arms)
    written = write_tables(study, raw, output=output, document=options.document)
    if options.json:
        runs = [asdict(result) for result in raw.results.values()]
        print(json.dumps({"written": [str(path) for path in written], "runs": runs}))
    else:
        print(f"wrote {', '.join(str(path) for path in written)}")
    return 1 if bad else 0


def parser() -> argparse.ArgumentParser:
    found = Parser(
        prog="mopd study", description="Run many recipes and seeds, and put them side by side."
    )
    found.add_argument("file", type=Path, help="a study file, as recipes/study/main.yaml")
    found.add_argument(
        "--output", type=Path, help="for raw.jsonl, tables and plots (default: beside the runs)"
    )
    found.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept")
    found.add_argument("--only", default="*", help="arms or groups that match this pattern")
    found.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    found.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override of every arm"
    )
    found.add_argument(
        "--document", type=Path, help="a Markdown file whose marked tables are written anew"
    )
    found.add_argument("--tables", action="store_true", help="run nothing, write tables and plots")
    found.add_argument("--keep", action="store_true", help="keep checkpoints and journals")
    found.add_argument("--json", action="store_true", help="print raw results as JSON")
    return found
