"""The loop: sample, score, align, train, push; the same on every rank."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mopd.config.schema import RunConfig
from mopd.errors import DidNotLearnError, MopdError, Stopped
from mopd.losses.balance import Balance
from mopd.losses.cross_entropy import CROSS_ENTROPY
from mopd.metrics.sinks import Sink
from mopd.metrics.summary import Summary
from mopd.rollout import sync
from mopd.runtime.build import Run
from mopd.runtime.dump_write import StepDump
from mopd.runtime.evaluate import Scores, has_learned, results
from mopd.runtime.evaluation import (
    Evaluation,
    best,
    evaluate,
    evaluate_teachers,
    is_due,
    patience_is_over,
    refuse_unmeasured,
)
from mopd.runtime.gather import Gathered
from mopd.runtime.learned import save_learned_projections
from mopd.runtime.ledger import added
from mopd.runtime.objective import loss_balance, static_weights
from mopd.runtime.probe import compare, names_of, probe_ids
from mopd.runtime.replica import any_rank, from_lead, gather_leads, sum_over_leads
from mopd.runtime.report import first_kl, log_step, loss_values, mean_of
from mopd.serving.journal import drop_stale_journals
from mopd.student import checkpoint
from mopd.student.adapter_io import save_peft
from mopd.student.hf_export import iter_hf_weights, save_hf
from mopd.student.step import StepResult
from mopd.types import StepBatch

MAX_IDLE_IN_A_ROW = 10


@dataclass(slots=True)
class State:
    """What a checkpoint keeps beside the model: everything else follows from the step."""

    step: int = 0
    before: Scores = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    teachers: dict[str, float | None] = field(default_factory=dict)
    chunks: dict[str, dict[str, float]] = field(default_factory=dict)
    balance: dict[str, float | None] = field(default_factory=dict)
    first_kl: dict[str, float] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)
    skipped_in_a_row: int = 0
    empty_in_a_row: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def train(run: Run, sink: Sink) -> Summary:
    """Trains from the newest checkpoint, or from the start, to ``train.steps``.

    Every rank returns the same summary. Policy version n is the student before step n.

    Raises:
        Stopped: after a step and a checkpoint of it, where any rank was asked to stop.
    """
    started = time.perf_counter()
    state = _resume(run, sink)
    config, seconds_before = run.config, state.seconds
    saver = _saver(run)
    text = probe_ids(run.tokenizer)
    _push(run, state.step, text)
    if not state.evaluations and (run.heldout or run.validation):
        sink.note("measuring the student and its teachers on the held-out prompts")
        first = _evaluate(run, sink, state)
        refuse_unmeasured(config, first)
        state.before = first.scores
        state.teachers = evaluate_teachers(run)
    if run.feed is not None:
        run.feed.ahead.start(state.step)
    for step in range(state.step, config.train.steps):
        if patience_is_over(config, _evaluations(state)):
            break
        began = time.perf_counter()
        gathered = run.feed.gather(step) if run.feed else None
        with _turn(run):
            share = _judged(run, gathered)
            with run.spans("broadcast"):
                batch = from_lead(run.topology, share)
            batch = _balanced(run, state, batch)
            with run.spans("train"):
                dump = StepDump(run, step) if step == config.debug.dump_step else None
                capture = dump.capture if dump is not None else None
                result = run.student.train_step(batch, capture=capture)
        if dump is not None:
            sink.note(f"wrote {dump.write(batch, result)}")
        if run.feed is not None:
            run.feed.settle(step, skipped=result.skipped)
        _rebalance(run, state, batch, result)
        if step == 0:
            state.first_kl = first_kl(run, loss_values(result.metrics, batch))
        with run.spans("sync"):
            _await_samples(run, step + 1)
            distance = _push(run, step + 1, text)
        state.step = step + 1
        log_step(run, sink, batch, result, seconds=time.perf_counter() - began, probe=distance)
        _stop_if_stuck(state, batch, result)
        found = _evaluate(run, sink, state) if is_due(config, state.step) else None
        state.seconds = seconds_before + time.perf_counter() - started
        stopping = any_rank(run.topology, run.stop_asked())
        if stopping or _save_is_due(config, state, evaluated=found is not None):
            score = found.score(config.evaluate.metric) if found else None
            with run.spans("save"):
                _save(run, state, saver, score=score)
        saver.check()
        run.finished()
        if stopping:
            saver.close()
            raise Stopped(f"SIGTERM: ended after step {state.step}, with a checkpoint of it")
    saver.close()
    return _finish(run, sink, state, started=started, seconds_before=seconds_before)


def _judged(run: Run, gathered: Gathered | None) -> StepBatch | None:
    """This replica's share of a step, on its lead; all ranks score for it."""
    gathered = run.inside.judge(gathered)
    return run.feed.collate(gathered) if run.feed and gathered else None


@contextmanager
def _turn(run: Run) -> Iterator[None]:
    """The student's turn on its devices; what it takes to get and to give is timed."""
    with ExitStack() as stack:
        with run.spans("turn"):
            stack.enter_context(run.turns.turn())
        yield
        with run.spans("turn"):
            stack.close()


def _await_samples(run: Run, version: int) -> None:
    """Until nobody samples from weights that are older than ``version`` allows."""
    if run.feed is not None:
        with run.spans("wait"):
            run.feed.ahead.before_push(version)


def _push(run: Run, version: int, text: np.ndarray) -> float | None:
    """How far the engines are from the student on ``text`` [L], where there are engines."""
    distance = None
    if run.config.rollout.backend.type != "dataset":
        sync.push(iter_hf_weights(run.student.model), run.sampler, version=version)
        distance = _probe(run, text)
    if run.feed is not None:
        run.feed.ahead.after_push(version)
    return distance


def _probe(run: Run, ids: np.ndarray) -> float | None:
    with run.turns.turn():
        own = run.student.logprobs(ids, vocab_size=run.tokenizer.vocabulary.size)
    if run.sampler is None:
        return None
    tolerance = run.config.rollout.backend.probe_tolerance
    found = run.sampler.probe(ids)
    return compare(own, found, tolerance=tolerance, names=names_of(run.sampler))


def _resume(run: Run, sink: Sink) -> State:
    """The newest checkpoint; answers and replies that were written after it are used again."""
    config = run.config
    latest = checkpoint.find_latest(run.directory / "checkpoints")
    state = State()
    if latest is not None:
        with run.turns.turn():
            restored = checkpoint.load(
                latest, student=run.student, seed=config.run.seed, verify=config.checkpoint.verify
            )
        state = State(**restored.state)
        sink.note(f"continuing from step {state.step}, the last checkpoint")
        if restored.reseeded:
            sink.note("another layout wrote it: the random generators start from seed and step")
    sink.truncate_from(state.step)
    if run.feed is None:
        return state
    size = config.train.num_prompts_per_step * config.rollout.num_generations_per_prompt
    run.feed.books.journal.resume_from(state.step, size=size // run.topology.dp_size)
    if run.feed.books.samples is not None:
        run.feed.books.samples.truncate_from(state.step)
    if run.topology.dp_rank == 0:
        drop_stale_journals(run.directory, num_replicas=run.topology.dp_size)
        run.feed.chunks.update({name: Counter(c) for name, c in state.chunks.items()})
        if state.ledger:
            run.feed.books.ledger.restore(state.ledger)
    return state


def _evaluations(state: State) -> list[Evaluation]:
    return [Evaluation.from_json(one) for one in state.evaluations]


def _evaluate(run: Run, sink: Sink, state: State) -> Evaluation:
    """With the weights after ``state.step`` steps; part of the state from then on."""
    with run.spans("evaluate"):
        found = evaluate(run, state.step)
    state.evaluations.append(found.to_json())
    if run.config.evaluate.interval is not None and state.step > 0:
        sink.log(state.step - 1, found.line)  # beside the line of the step that it follows
    if found.line:
        sink.note(found.describe())
    return found


def _save_is_due(config: RunConfig, state: State, *, evaluated: bool) -> bool:
    last = state.step == config.train.steps or patience_is_over(config, _evaluations(state))
    candidate = evaluated and config.checkpoint.keep_best > 0
    return last or candidate or state.step % config.checkpoint.save_interval == 0


def _saver(run: Run) -> checkpoint.Saver:
    section = run.config.checkpoint
    return checkpoint.Saver(
        run.directory / "checkpoints",
        student=run.student,
        keep_last=section.keep_last,
        keep_best=section.keep_best,
        async_save=section.async_save,
    )


def _save(run: Run, state: State, saver: checkpoint.Saver, *, score: float | None = None) -> None:
    """``score`` is that of an evaluation of these very weights, the higher the better."""
    state.chunks = _chunks(run)
    state.ledger = _ledger(run)
    with run.turns.turn():
        saver.save(state.to_json(), score=score)
    if run.feed is not None:
        run.feed.books.replies.prune(checkpoint.oldest_step(run.directory / "checkpoints"))


def _ledger(run: Run) -> dict[str, Any]:
    """Over all replicas, on every rank."""
    if run.feed is None:
        return from_lead(run.topology, None)
    return from_lead(run.topology, added(gather_leads(run.topology, run.feed.books.ledger.state())))


def _chunks(run: Run) -> dict[str, dict[str, float]]:
    """Chunk counters over all replicas, on every rank."""
    if run.feed is None:
        return from_lead(run.topology, None)
    keys = sorted({key for counts in run.feed.chunks.values() for key in counts} | _CHUNK_KEYS)
    table = np.array([[counts[key] for key in keys] for counts in run.feed.chunks.values()])
    total = sum_over_leads(run.topology, table.astype(np.float64).reshape(-1)).reshape(table.shape)
    found = {
        name: dict(zip(keys, row.tolist(), strict=True))
        for name, row in zip(run.feed.chunks, total, strict=True)
    }
    return from_lead(run.topology, found)


_CHUNK_KEYS = {
    *(f"{what} {kind}" for what in ("chunks", "tokens") for kind in ("1-1", "1-n", "n-1", "n-m")),
    "tokens unaligned",
}


def _stop_if_stuck(state: State, batch: StepBatch, result: StepResult) -> None:
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if result.skipped else 0
    if state.skipped_in_a_row >= MAX_IDLE_IN_A_ROW:
        raise MopdError(
            f"step {state.step}: {state.skipped_in_a_row} steps in a row had a loss or gradient "
            "that is not finite; lower student.optimizer.lr or look at the teachers' scores"
        )
    state.empty_in_a_row = 0 if batch.num_response_tokens else state.empty_in_a_row + 1
    if state.empty_in_a_row >= MAX_IDLE_IN_A_ROW:
        raise MopdError(
            f"step {state.step}: {state.empty_in_a_row} steps in a row had no answer to train on; "
            "look at dropped/<why> in metrics.jsonl (rollout.max_new_tokens, "
            "rollout.mask_truncated_completions, rollout.max_staleness)"
        )


def _balanced(run: Run, state: State, batch: StepBatch) -> StepBatch:
    """The batch with what the teachers' losses and the cross entropy count in this step."""
    distillation, crossentropy = _balance(run, state).scales()
    return replace(batch, distillation_weight=distillation, crossentropy_weight=crossentropy)


def _balance(run: Run, state: State) -> Balance:
    balance = loss_balance(run.config)
    return balance.from_state(state.balance) if state.balance else balance


def _rebalance(run: Run, state: State, batch: StepBatch, result: StepResult) -> None:
    """Global means of the step, the same on every rank."""
    balance = _balance(run, state)
    if result.skipped or balance.mode == "fixed":
        return
    every = {**static_weights(run.config), **batch.weights}
    weights = {name: w for name, w in every.items() if batch.denominators.get(name, 0.0) > 0}
    distilled = sum(
        w * mean_of(f"loss/{name}", result.metrics, batch)[0] for name, w in weights.items()
    )
    distilled /= sum(weights.values()) or 1.0
    crossed, _ = mean_of(f"loss/{CROSS_ENTROPY}", result.metrics, batch)
    state.balance = balance.update(distilled, crossed).state()


def _finish(
    run: Run, sink: Sink, state: State, *, started: float, seconds_before: float
) -> Summary:
    config = run.config
    stopped = state.step < config.train.steps
    if (run.heldout or run.validation) and state.evaluations[-1]["step"] != state.step:
        _evaluate(run, sink, state)
    found = _evaluations(state)
    after = found[-1].scores if found else {}
    top = best(found, config.evaluate.metric) if config.evaluate.interval is not None else None
    source = config.student.model
    assert source is not None
    save_hf(run.student.model, run.directory / "hf", source_dir=source)
    if config.student.lora.rank is not None and run.topology.dp_rank == 0:
        save_peft(run.student.model, run.directory / "adapter", base_dir=source)
    save_learned_projections(run.student, run.pairs, run.directory / "projections")
    return Summary(
        steps=state.step,
        seconds=seconds_before + time.perf_counter() - started,
        domains=results(state.before, after, state.teachers),
        chunks=_chunks(run),
        answers=_ledger(run),
        first_kl=state.first_kl,
        learned=has_learned(state.before, after) if after else None,
        evaluations=[{"step": one.step, **one.line} for one in found],
        best_step=None if top is None else top.step,
        stopped_early=state.step if stopped else None,
    )


def refuse_if_not_learned(summary: Summary) -> None:
    """Says so when held-out accuracy did not rise, and what may be the matter.

    Raises:
        DidNotLearnError: the gain is within two standard errors.
    """
    if summary.learned is not False:
        return
    moves = ", ".join(f"{n} {r.before:.0%} -> {r.after:.0%}" for n, r in summary.domains.items())
    useless = [
        n for n, r in summary.domains.items() if r.teacher is not None and r.teacher <= r.before
    ]
    advice = (
        f"the teachers of {', '.join(useless)} are no better than the student was: look at their "
        "chat template and at the prompts"
        if useless
        else "train longer, or start from a student that is right now and then"
    )
    raise DidNotLearnError(
        f"the student learned nothing that its held-out answers show in {summary.steps} steps "
        f"({moves}); {advice} (evaluate.fail_if_not_learned=false accepts this)"
    )
