"""An evaluation of a run: held-out accuracy, the teachers' divergence, a validation loss.

Collective over all ranks. It changes nothing that training reads: no weight, generator, journal
or count.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

from mopd.config.check_evaluate import metric_user
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError
from mopd.rollout import sync
from mopd.rollout.on_demand import OnDemandSampler
from mopd.runtime.answering import InParts, telling_domains
from mopd.runtime.build import Run
from mopd.runtime.evaluate import Scores, batches_of, by_domain, student_scores, teacher_scores
from mopd.runtime.gather import Gathered
from mopd.runtime.replica import from_lead, sum_over_leads
from mopd.runtime.report import mean_of
from mopd.student.hf_export import iter_hf_weights
from mopd.types import Prompt

KL = "eval/kl/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """After ``step`` optimizer steps. ``metrics`` are named as in a line of metrics."""

    step: int
    scores: Scores = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def line(self) -> dict[str, float]:
        """Everything, by the names of a line of metrics."""
        line = {f"eval/accuracy/{name}": s["accuracy"] for name, s in self.scores.items()}
        line |= {f"eval/canonical/{name}": s["canonical"] for name, s in self.scores.items()}
        return line | dict(self.metrics)

    def score(self, metric: str) -> float | None:
        """By ``evaluate.metric``, the higher the better; None where it was not measured."""
        values = {
            "accuracy": [s["accuracy"] for s in self.scores.values()],
            "kl": [-value for name, value in self.metrics.items() if name.startswith(KL)],
            "loss": [-value for name, value in self.metrics.items() if name == "eval/loss"],
        }[metric]
        found = sum(values) / len(values) if values else math.nan
        return found if math.isfinite(found) else None

    def describe(self) -> str:
        """One line for people."""
        parts = [f"accuracy {n} {s['accuracy']:.1%}" for n, s in self.scores.items()]
        shown = (KL, "eval/loss")
        parts += [
            f"{name.removeprefix('eval/')} {value:.4f}"
            for name, value in self.metrics.items()
            if name.startswith(shown)
        ]
        return f"evaluation after {self.step} steps: {', '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Evaluation:
        return cls(**values)


def is_due(config: RunConfig, step: int) -> bool:
    """Whether ``step`` finished steps call for an evaluation on the way, or for the last one."""
    interval = config.evaluate.interval
    return interval is not None and (step % interval == 0 or step == config.train.steps)


def best(evaluations: Sequence[Evaluation], metric: str) -> Evaluation | None:
    """The first with the highest score."""
    scored = [one for one in evaluations if one.score(metric) is not None]
    return max(scored, key=lambda one: one.score(metric) or 0.0, default=None)


def patience_is_over(config: RunConfig, evaluations: Sequence[Evaluation]) -> bool:
    """Whether the last ``evaluate.patience`` evaluations brought no better score."""
    patience = config.evaluate.patience
    if patience is None:
        return False
    top = best(evaluations, config.evaluate.metric)
    since = [one for one in evaluations if top is None or one.step > top.step]
    return len(since) >= patience


def refuse_unmeasured(config: RunConfig, first: Evaluation) -> None:
    """What goes by evaluations needs a number from the ``first`` one on.

    Raises:
        ConfigError: the metric, who goes by it, and what may be missing.
    """
    metric = config.evaluate.metric
    user = metric_user(config)
    if user is None or first.score(metric) is not None:
        return
    causes = {
        "accuracy": "no row of data.heldout_path has data.answer_key",
        "kl": "no teacher has a usable score of a held-out answer",
        "loss": "no row of data.validation_path is left to measure (rollout.max_new_tokens, "
        "rollout.mask_truncated_completions), or its loss is not finite",
    }
    raise ConfigError(
        f"evaluate.metric={metric}: {user} goes by it, and the first evaluation found no number: "
        f"{causes[metric]}; correct that, or choose another metric"
    )


def evaluate(run: Run, step: int) -> Evaluation:
    """With policy version ``step``, which the sampler has; collective over all ranks."""
    with run.feed.ahead.paused() if run.feed is not None else nullcontext():
        on_demand = run.config.rollout.backend.type == "dataset" and bool(run.heldout)
        if on_demand:
            sync.push(iter_hf_weights(run.student.model), run.sampler, version=step)
        scores = _accuracies(run) if run.heldout else {}
        metrics = _divergences(run) if run.heldout else {}
        if isinstance(run.sampler, OnDemandSampler):
            run.sampler.release()
        metrics |= _validation(run)
        troubles = None if run.eval_feed is None else run.eval_feed.troubles()
    for name, count in from_lead(run.topology, troubles).items():
        metrics[f"eval/{name}"] = float(count)
    return Evaluation(step=step, scores=scores, metrics=metrics)


def evaluate_teachers(run: Run) -> dict[str, float | None]:
    """Accuracy of the best teacher of each domain, where it is asked for; on every rank."""
    if not run.config.evaluate.teachers or not run.heldout:
        return {}
    domains = by_domain(run.heldout, run.config.evaluate.max_prompts_per_domain)
    found = None
    if run.pool is not None:
        found = teacher_scores(
            run.pool.teachers,
            domains,
            max_new_tokens=run.config.rollout.max_new_tokens,
            finished=telling_domains(
                "the teachers answer held-out prompts",
                domains,
                activity=run.activity,
                finished=run.finished,
            ),
        )
    return from_lead(run.topology, found)


def _accuracies(run: Run) -> Scores:
    domains = by_domain(run.heldout, run.config.evaluate.max_prompts_per_domain)
    scores = None
    backend, rank, size = run.config.rollout.backend, run.topology.dp_rank, run.topology.dp_size
    if run.sampler is not None:
        in_parts = InParts(
            run.sampler,
            part_size=backend.batch_size * max(1, len(backend.urls)),  # each server has its fill
            total=sum(len(prompts[rank::size]) for prompts in domains.values()),
            activity=run.activity,
            finished=run.finished,
        )
        scores = student_scores(
            in_parts,
            domains,
            tokenizer=run.tokenizer,
            share=(rank, size),
            sum_over_replicas=lambda values: sum_over_leads(run.topology, values),
            finished=run.finished,
        )
    return from_lead(run.topology, scores)


def _divergences(run: Run) -> dict[str, float]:
    """Of the teachers on the student's own greedy answers."""
    section = run.config.evaluate
    if section.interval is None or section.kl_prompts_per_domain == 0:
        return {}
    found = _measured(
        run,
        "asking the teachers about held-out answers",
        run.heldout,
        per_domain=section.kl_prompts_per_domain,
        gather=None if run.eval_feed is None else run.eval_feed.answered,
    )
    return {f"eval/{name}": mean for name, mean in found.items() if name.startswith("kl/")}


def _validation(run: Run) -> dict[str, float]:
    """The losses of training on rows with answers."""
    if not run.validation:
        return {}
    found = _measured(
        run,
        "measuring the validation loss",
        run.validation,
        per_domain=run.config.evaluate.max_prompts_per_domain,
        gather=None if run.eval_feed is None else run.eval_feed.given,
    )
    return {
        f"eval/validation_{name}" if name.startswith("kl/") else f"eval/{name}": mean
        for name, mean in found.items()
    }


def _measured(
    run: Run,
    what: str,
    prompts: Sequence[Prompt],
    *,
    per_domain: int,
    gather: Callable[[Sequence[Prompt]], Gathered] | None,
) -> dict[str, float]:
    """``loss``, ``loss/<name>`` and ``kl/<teacher>``, in batches as large as a step.

    A name's mean is over all of its rows; ``loss`` is the mean of the batches' objectives.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, float] = defaultdict(float)
    size = run.config.train.num_prompts_per_step
    groups = batches_of(prompts, per_domain=per_domain, size=size)
    for number, group in enumerate(groups):
        run.activity(what, number, len(groups), "batches")
        gathered = None if gather is None else gather(group)
        with run.turns.turn():
            gathered = run.inside.judge(gathered)
            feed = run.eval_feed
            batch = from_lead(run.topology, feed.collate(gathered) if feed and gathered else None)
            result = run.student.evaluate(batch)
        if batch.num_response_tokens:  # else nothing of the group is measured: 0 is no loss
            sums["loss"] += result.loss * len(group)
            counts["loss"] += len(group)
        for name in result.metrics:
            if name.startswith(("loss/", "kl/")):
                mean, count = mean_of(name, result.metrics, batch)
                sums[name] += mean * count
                counts[name] += count
        run.finished()
    run.activity(what, len(groups), len(groups), "batches")
    return {name: sums[name] / counts[name] for name in sums if counts[name] > 0}
