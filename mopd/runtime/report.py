"""A step's line of metrics, and the warnings that it deserves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from mopd.losses.cross_entropy import CROSS_ENTROPY
from mopd.losses.observe import COUNT, SUM
from mopd.losses.opd import CHUNKS
from mopd.metrics.metric import means, merge, values
from mopd.metrics.phases import phases
from mopd.metrics.sinks import Sink
from mopd.metrics.thresholds import DROPPED, FAR_TEACHER, MASKED, RESCORED, SCORED
from mopd.runtime.build import Run
from mopd.runtime.replica import gather_leads
from mopd.student.step import StepResult
from mopd.types import StepBatch

FIRST_KL = "first_kl"


def log_step(
    run: Run,
    sink: Sink,
    batch: StepBatch,
    result: StepResult,
    *,
    seconds: float,
    probe: float | None = None,
) -> None:
    """Collective over the lead ranks; other ranks return at once."""
    line: dict[str, float] = {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "skipped": float(result.skipped),
    }
    line |= loss_values(result.metrics, batch)
    if run.feed is None:
        return
    if batch.step == 0:
        line |= {f"{FIRST_KL}/{name}": value for name, value in first_kl(run, line).items()}
        _warn_of_distance(run, sink, line)
    # every lead knows its own rollouts; the line shows all of them
    told = gather_leads(run.topology, (means(batch.metrics), run.feed.samples))
    merged = merge(part for part, _ in told)
    tokens = merged["masked"].count
    line |= values(merged) | quantiles(part for _, part in told)
    for warning in warnings_of(line, run.pairs):
        sink.note(f"warning: step {batch.step}: {warning}")
    line["tokens_per_second"] = tokens / seconds
    line["time/step"] = seconds
    if probe is not None:
        line["sync/probe"] = probe
    line |= values({**run.feed.times, **run.spans.drain()})
    line |= phases(line, ahead=run.config.rollout.max_staleness > 0)
    sink.log(batch.step, line)


def warnings_of(line: Mapping[str, float], teachers: Iterable[str]) -> Iterator[str]:
    """What somebody should look at in a step's line of metrics."""
    if (masked := line.get("masked", 0.0)) > MASKED:
        yield (
            f"{masked:.0%} of the response tokens have no teacher; the policy may be "
            "leaving the text that teachers can read"
        )
    dropped = {key: share for key, share in line.items() if key.startswith("dropped/") and share}
    if sum(dropped.values()) > DROPPED:
        reasons = ", ".join(f"{key}: {share:.0%}" for key, share in sorted(dropped.items()))
        yield f"{sum(dropped.values()):.0%} of the answers are not trained on ({reasons})"
    for name in teachers:
        if (share := line.get(f"scored/{name}", 1.0)) < SCORED:
            yield (
                f"teachers.{name} scored only {share:.0%} of the tokens it was asked for "
                f"(see missing/{name}/)"
            )
    if line.get("rescored/nats", 0.0) > RESCORED or line.get("rescored/other_tokens"):
        yield (
            f"a teacher scores {line['rescored/nats']:.2g} nats an answer away from before the "
            "restart; is it the same model?"
        )


def _warn_of_distance(run: Run, sink: Sink, line: Mapping[str, float]) -> None:
    """A policy gradient needs a teacher that finds the student's answers likely."""
    for name, pair in run.pairs.items():
        distance = line.get(f"{FIRST_KL}/{name}", 0.0)
        if pair.loss == "opd" and distance > FAR_TEACHER:
            sink.note(
                f"warning: {name} is far from the student ({distance:.2f} nats a chunk, "
                f"above {FAR_TEACHER}); expect a slow or unstable policy gradient, or begin with "
                "distillation.loss=kl or ctkd"
            )


def loss_values(metrics: Mapping[str, float], batch: StepBatch) -> dict[str, float]:
    """What the losses tell of a step, from the sums over all replicas (`StepResult.metrics`):
    loss/<teacher>, kl/<teacher>, kl_domain/<domain>, topk_overlap/<teacher>, ...

    A teacher that judged nothing in the step has no loss and no divergence, rather than 0.
    """
    found = {}
    for name, value in metrics.items():
        if name.startswith("moe/"):
            found[name] = value
        elif name.startswith(SUM):
            key = name.removeprefix(SUM)
            if count := metrics[COUNT + key]:
                found[key] = value / count
        elif not name.startswith((f"{CHUNKS}/", COUNT)):
            mean, count = mean_of(name, metrics, batch)
            if count > 0:
                found[name] = mean
    return found


def first_kl(run: Run, line: Mapping[str, float]) -> dict[str, float]:
    """Of every teacher that judged something and whose loss has one, in nats: the divergence of
    the first step, of a policy gradient the mean over chunks without weights."""
    found = {
        name: line.get(f"distance/{name}", line.get(f"kl/{name}"))
        for name, pair in run.pairs.items()
        if pair.loss != "uld"
    }
    return {name: value for name, value in found.items() if value is not None}


def quantiles(parts: Iterable[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """name -> values, of all replicas; a name is <what>_p<percent> or <what>_p<percent>/<who>."""
    joined: dict[str, list[float]] = {}
    for part in parts:
        for name, each in part.items():
            joined.setdefault(name, []).extend(each)
    found = {}
    for name, each in joined.items():
        percent = int(name.split("/")[0].rpartition("_p")[2])
        if each:
            found[name] = float(np.percentile(each, percent))
    return found


def mean_of(name: str, metrics: Mapping[str, float], batch: StepBatch) -> tuple[float, float]:
    """Of a loss's sum: over the teacher's rows, its chunks, or the response tokens; and of how
    many."""
    kind, of = name.split("/", 1)
    count = batch.num_response_tokens if of == CROSS_ENTROPY else batch.denominators[of]
    if kind not in ("loss", "kl"):
        count = metrics[f"{CHUNKS}/{of}"]
    return metrics.get(name, 0.0) / (count or 1.0), count
