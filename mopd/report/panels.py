"""Which metrics share a plot, and under which heading. Unknown ones come last, under "Other"."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from mopd.metrics.phases import PREFIX

OTHER = "Other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A plot of all metrics that are one of ``prefixes``, or begin with one and a slash."""

    section: str
    title: str
    prefixes: tuple[str, ...]
    is_share: bool = False  # an axis in percent
    is_exact: bool = False  # set, not measured: no running mean
    hint: str = ""

    def takes(self, name: str) -> bool:
        return any(name == p or name.startswith(f"{p}/") for p in self.prefixes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One plot: a label and a metric's name for each curve."""

    section: str
    title: str
    is_share: bool = False
    is_exact: bool = False
    hint: str = ""
    curves: list[tuple[str, str]] = field(default_factory=list)


LEARNING, ANSWERS, TEACHERS, OPTIMIZER, SPEED = (
    *("Learning", "Answers", "Teachers", "Optimizer", "Speed"),
)
KINDS = (
    Kind(
        section=LEARNING,
        title="Held-out accuracy",
        prefixes=("eval/accuracy",),
        is_share=True,
        hint="greedy answers to data.heldout_path",
    ),
    Kind(
        section=LEARNING,
        title="Accuracy of rollouts",
        prefixes=("accuracy",),
        is_share=True,
        hint="sampled answers, where the task has a checkable one",
    ),
    Kind(section=LEARNING, title="Loss", prefixes=("loss",), hint="per teacher: on its own rows"),
    Kind(
        section=LEARNING,
        title="KL to the teachers",
        prefixes=("kl",),
        hint="on the answers that are trained on, nats a row",
    ),
    Kind(
        section=LEARNING,
        title="KL by domain",
        prefixes=("kl_domain",),
        hint="all teachers together, nats a row",
    ),
    Kind(
        section=LEARNING,
        title="Overlap with the teacher's list",
        prefixes=("topk_overlap",),
        is_share=True,
        hint="its likeliest tokens that are among as many of the student's",
    ),
    Kind(
        section=LEARNING,
        title="Mass on the teacher's list",
        prefixes=("topk_mass", "teacher_topk_mass"),
        is_share=True,
        hint="of the student, and of the teacher itself",
    ),
    Kind(
        section=LEARNING,
        title="Likeliest tokens",
        prefixes=("top1", "top1_projected"),
        is_share=True,
        hint="top1: the student's is the one in the text; top1_projected: it is the teacher's",
    ),
    Kind(
        section=LEARNING,
        title="Entropy",
        prefixes=("entropy",),
        hint="of the student's next token, nats",
    ),
    Kind(
        section=LEARNING,
        title="Held-out KL",
        prefixes=("eval/kl",),
        hint="on held-out answers, nats a row",
    ),
    Kind(section=LEARNING, title="Validation loss", prefixes=("eval/loss",)),
    Kind(
        section=LEARNING,
        title="Validation KL",
        prefixes=("eval/validation_kl",),
        hint="on the rows of data.validation_path, nats a row",
    ),
    Kind(
        section=ANSWERS,
        title="Canonical answers",
        prefixes=("canonical",),
        is_share=True,
        hint="written in the student's own segmentation",
    ),
    Kind(section=ANSWERS, title="Held-out canonical", prefixes=("eval/canonical",), is_share=True),
    Kind(
        section=ANSWERS,
        title="Truncated answers",
        prefixes=("truncated",),
        is_share=True,
        hint="at rollout.max_new_tokens",
    ),
    Kind(
        section=ANSWERS,
        title="Length of answers",
        prefixes=("response_length", "response_length_p95"),
        hint="tokens",
    ),
    Kind(
        section=ANSWERS,
        title="Tokens without a judgement",
        prefixes=("masked", "untrained", "interior"),
        is_share=True,
        hint="masked: no teacher; interior: inside a chunk, judged with it",
    ),
    Kind(section=ANSWERS, title="Dropped answers", prefixes=("dropped",), is_share=True),
    Kind(section=ANSWERS, title="Share on-policy", prefixes=("on_policy",), is_share=True),
    Kind(section=ANSWERS, title="Staleness", prefixes=("staleness",), hint="steps"),
    Kind(
        section=TEACHERS,
        title="Scored tokens",
        prefixes=("scored",),
        is_share=True,
        hint="of those a teacher was asked for",
    ),
    Kind(
        section=TEACHERS,
        title="Aligned tokens",
        prefixes=("alignment",),
        is_share=True,
        hint="of the student, that lie in a chunk",
    ),
    Kind(
        section=TEACHERS,
        title="Aligned tokens by kind of chunk",
        prefixes=("alignment_1-1", "alignment_1-n", "alignment_n-1", "alignment_n-m"),
        is_share=True,
        hint="student tokens-teacher tokens; they add up to the aligned ones",
    ),
    Kind(
        section=TEACHERS,
        title="How texts were aligned",
        prefixes=("alignment_mismatch", "alignment_offsets", "alignment_strings"),
        is_share=True,
        hint="answers whose texts differ, or that a tokenizer's own account aligned",
    ),
    Kind(
        section=TEACHERS,
        title="Unreachable mass",
        prefixes=("unreachable_mass",),
        hint="of the teacher, on tokens that no student token begins with",
    ),
    Kind(
        section=TEACHERS,
        title="Mass of interior rows",
        prefixes=("interior_coverage",),
        is_share=True,
        hint="of the teacher, that rows inside chunks speak for",
    ),
    Kind(
        section=TEACHERS,
        title="Share of tokens",
        prefixes=("token_share",),
        is_share=True,
        hint="response tokens that a teacher judged",
    ),
    Kind(section=TEACHERS, title="Weights", prefixes=("weight",)),
    Kind(
        section=TEACHERS,
        title="Distance",
        prefixes=("distance",),
        hint="policy gradient: nats a chunk",
    ),
    Kind(
        section=TEACHERS,
        title="Distance in the first step",
        prefixes=("first_kl",),
        hint="nats",
    ),
    Kind(
        section=TEACHERS,
        title="Importance ratio",
        prefixes=("ratio", "log_ratio"),
        hint="policy gradient: student to sampler",
    ),
    Kind(
        section=TEACHERS,
        title="Gated tokens",
        prefixes=("gated",),
        is_share=True,
        hint="policy gradient: whose ratio was cut",
    ),
    Kind(
        section=TEACHERS,
        title="Latency",
        prefixes=("latency_p50", "latency_p95"),
        hint="seconds of a request: median and 95th percentile",
    ),
    Kind(
        section=TEACHERS, title="Failed requests and events", prefixes=("requests", "eval/requests")
    ),
    Kind(section=TEACHERS, title="Positions without a score", prefixes=("missing", "eval/missing")),
    Kind(section=TEACHERS, title="Scored anew", prefixes=("rescored",)),
    Kind(section=OPTIMIZER, title="Gradient norm", prefixes=("grad_norm",)),
    Kind(section=OPTIMIZER, title="Learning rate", prefixes=("lr",), is_exact=True),
    Kind(section=OPTIMIZER, title="Skipped steps", prefixes=("skipped",)),
    Kind(
        section=OPTIMIZER,
        title="Load of the experts",
        prefixes=("moe/load_balancing", "moe/max_load"),
        hint="1 is even",
    ),
    Kind(section=SPEED, title="Tokens per second", prefixes=("tokens_per_second",)),
    Kind(section=SPEED, title="Seconds per step", prefixes=("time/step",)),
    Kind(
        section=SPEED,
        title="Sampler's distance after a push",
        prefixes=("sync",),
        hint="largest difference of log-probabilities",
    ),
    Kind(
        section=SPEED,
        title="Journal",
        prefixes=("journal_mb",),
        is_exact=True,
        hint="MB on disk",
    ),
)
SECTIONS = (LEARNING, ANSWERS, TEACHERS, OPTIMIZER, SPEED, OTHER)


def panels_of(names: Iterable[str]) -> list[Panel]:
    """Every name in one plot, but for the phases of a step, which have a picture of their own."""
    known = {kind.title: _empty(kind) for kind in KINDS}
    others: dict[str, Panel] = {}
    for name in sorted(names):
        kind = next((kind for kind in KINDS if kind.takes(name)), None)
        if kind is not None:
            known[kind.title].curves.append((label_of(name, kind.prefixes), name))
        elif not name.startswith(("time/", PREFIX)):
            first = _first(name)
            panel = others.setdefault(first, Panel(section=OTHER, title=first))
            panel.curves.append((label_of(name, (first,)), name))
    return [panel for panel in (*known.values(), *others.values()) if panel.curves]


def label_of(name: str, prefixes: tuple[str, ...]) -> str:
    """What a curve is called inside its plot: a teacher's or domain's name, or "all"."""
    for prefix in prefixes:
        if name.startswith(f"{prefix}/"):
            rest = name.removeprefix(f"{prefix}/")
            return rest if len(prefixes) == 1 else f"{prefix} {rest}"
        if name == prefix:
            return "all" if len(prefixes) == 1 else prefix
    return name


def _empty(kind: Kind) -> Panel:
    return Panel(
        section=kind.section,
        title=kind.title,
        is_share=kind.is_share,
        is_exact=kind.is_exact,
        hint=kind.hint,
    )


def _first(name: str) -> str:
    parts = name.split("/")
    return "/".join(parts[:2]) if parts[0] == "eval" and len(parts) > 2 else parts[0]
