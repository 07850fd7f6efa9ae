"""What somebody should look at in a run, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mopd.metrics.thresholds import (
    CANONICAL_LOSS,
    DROPPED,
    FAR_TEACHER,
    MASKED,
    RESCORED,
    SCORED,
    SKIPPED,
    TRUNCATED,
    WORSE,
)
from mopd.report.facts import headroom_of
from mopd.report.read import RunData
from mopd.report.series import Series


def warnings_of_run(run: RunData, series: Mapping[str, Series]) -> list[str]:
    """Over the last tenth of the run where a share may change with time."""
    return [*_of_state(run), *_of_results(run), *_of_metrics(series), *run.problems]


def _of_state(run: RunData) -> Iterator[str]:
    if run.status == "unfinished":
        yield (
            f"The run ended after step {run.num_steps} of {run.planned_steps}, or hangs: nothing "
            "was written for more than ten minutes. The same command continues it from its last "
            "checkpoint."
        )
    if run.summary.get("learned") is False:
        yield (
            "Held-out accuracy did not rise by more than two standard errors: look at the samples, "
            "the teachers' own accuracy and the learning rate."
        )


def _of_results(run: RunData) -> Iterator[str]:
    for one in headroom_of(run):
        if one.after < one.before - WORSE:
            yield (
                f"{one.domain}: accuracy fell from {one.before:.1%} to {one.after:.1%}; a lower "
                "student.optimizer.lr, or a teacher that suits the domain, may help."
            )
        if one.teacher is not None and one.teacher <= one.before:
            yield (
                f"{one.domain}: its teacher ({one.teacher:.1%}) is no better than the student was "
                f"({one.before:.1%}); check its chat template and the prompts."
            )
        if one.canonical_before is None or one.canonical_after is None:
            continue
        if one.canonical_after < one.canonical_before - CANONICAL_LOSS:
            yield (
                f"{one.domain}: the share of answers in the student's own segmentation fell from "
                f"{one.canonical_before:.0%} to {one.canonical_after:.0%}: it imitates the "
                "teacher's tokens."
            )


def _of_metrics(series: Mapping[str, Series]) -> Iterator[str]:
    if (share := _recent(series, "masked")) is not None and share > MASKED:
        yield f"{share:.0%} of the response tokens have no teacher's judgement (masked)."
    if (share := _recent(series, "truncated")) is not None and share > TRUNCATED:
        yield (
            f"{share:.0%} of the answers are cut at rollout.max_new_tokens: raise it, or the "
            "student does not learn to stop."
        )
    if "skipped" in series and (share := float(series["skipped"].values.mean())) > SKIPPED:
        yield f"{share:.0%} of the steps were skipped: a loss or gradient was not finite."
    dropped = _dropped(series)
    if dropped > DROPPED:
        yield f"{dropped:.0%} of the answers are not trained on; see Dropped answers."
    if "rescored/nats" in series and (nats := series["rescored/nats"].values.max()) > RESCORED:
        yield (
            f"After a restart a teacher scored {nats:.2g} nats an answer away from before; is it "
            "the same model?"
        )
    for name in series:
        kind, _, teacher = name.partition("/")
        if kind == "scored" and (share := _recent(series, name)) is not None and share < SCORED:
            yield f"{teacher} scored only {share:.0%} of the tokens it was asked for."
        if kind == "distance" and series[name].values[0] > FAR_TEACHER:
            yield (
                f"{teacher} was {series[name].values[0]:.2f} nats a chunk from the student in the "
                f"first step, above {FAR_TEACHER}: a policy gradient is slow or unstable there."
            )


def _recent(series: Mapping[str, Series], name: str) -> float | None:
    return float(series[name].tail().mean()) if name in series else None


def _dropped(series: Mapping[str, Series]) -> float:
    """Share of the answers, over the same steps as the others: a step in which a reason did not
    occur has no number for it."""
    if "loss" not in series:
        return 0.0
    steps = series["loss"].tail_steps()
    found = [one for name, one in series.items() if name.startswith("dropped/")]
    return sum(float(one.values[one.steps >= steps[0]].sum()) for one in found) / len(steps)
