"""Parse the command line, then import what the verb needs: `mopd --help` stays instant.

Exit codes: 0 done, 1 failed or found something wrong, 2 the command or the recipe is wrong, 130
interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from mopd import __version__
from mopd.cli.words import Parser
from mopd.errors import ConfigError, MopdError

VERBS = {
    "check": "validate a recipe; with --live also every teacher and the sampler",
    "checkpoint": "list or verify the checkpoints of a run",
    "compare": "show several runs side by side, as one HTML page",
    "completion": "print the completion script of a shell",
    "config": "print a recipe, resolved and validated",
    "eval": "measure a student on held-out prompts",
    "export": "write a checkpoint as a Hugging Face model or a PEFT adapter",
    "plan": "show who sits on which device of the recipe's cluster, and the memory that takes",
    "projection": "build, audit, show or convert the projection of two tokenizers",
    "recipe": "turn a configuration of another trainer into a recipe",
    "report": "show a run as one HTML page",
    "score": "score texts by one teacher: log-probabilities, alignment, loss",
    "serve": "score or sample token ids over HTTP, for runs elsewhere",
    "study": "run many recipes and seeds, and put them side by side",
    "world": "build the embedded world, or show where it is",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors of users are one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what could stand at the cursor
        from mopd.cli.completion import complete

        complete()
    chosen, _ = parser().parse_known_args(words[:1])
    run = importlib.import_module(f"mopd.cli.{chosen.verb}").run
    try:
        code = run(words[1:])
        if sys.stdout is not None:
            sys.stdout.flush()  # what cannot be written is told here, not behind the end
        return code
    except ConfigError as error:
        print(f"mopd: {error}", file=sys.stderr)
        return 2
    except MopdError as error:
        print(f"mopd: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        from mopd.runtime.signals import INTERRUPTED

        return INTERRUPTED
    except BrokenPipeError:  # who reads has read enough, as `head` does
        _drop_output()
        return 1
    except OSError as error:
        _drop_output()
        print(f"mopd: {_io_problem(error)}", file=sys.stderr)
        return 1


def _drop_output() -> None:
    """What stdout still holds would fail again when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # none, or none of a process
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _io_problem(error: OSError) -> str:
    from mopd.metrics.text import printable

    where = "stdout" if error.filename is None else str(error.filename)
    return printable(
        f"{where}: {error.strerror or error}; see that it is there, that you may use it, and that "
        "the disk has room"
    )


def parser() -> argparse.ArgumentParser:
    """Of the command without its verbs' own words."""
    found = Parser(prog="mopd", description="Multi-teacher on-policy distillation.")
    found.add_argument("--version", action="version", version=f"mopd {__version__}")
    verbs = found.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, summary in VERBS.items():
        # The verb parses its own words, so that its module is imported only when it is used.
        verbs.add_parser(verb, help=summary, add_help=False)
    return found
