"""No answer is lost or trained twice, whatever is skipped, fails, overlaps or is killed (R13)."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mopd.errors import ArtifactError, MopdError
from mopd.runtime.ahead import Ahead
from mopd.runtime.gather import Gathered, Gatherer, GatherOptions
from mopd.runtime.ledger import Ledger, added
from mopd.serving.journal import Journal, read_journal
from mopd.serving.replies import ReplyJournal
from mopd.types import Prompt, Rollout, TeacherScores
from tests.unit.tokens.trained import vocabulary

STEPS, PROMPTS, SAVE = 6, 3, 2
WORDS = vocabulary("byte_level")
STUDENT = SimpleNamespace(
    vocabulary=WORDS,
    eos_id=WORDS.eos_id,
    prompt_ids=lambda messages: np.array([1], dtype=np.int32),
)
SCHEDULES = 1000


class Killed(Exception):
    """The process ends here."""


@dataclass
class Weather:
    """What goes wrong, drawn once per schedule."""

    random: random.Random
    lag: int = 0
    failures: float = 0.0
    crashes: int = 0

    def strikes(self, chance: float) -> bool:
        return self.random.random() < chance


def prompts_of(step: int) -> list[Prompt]:
    return [Prompt(id=f"{step}-{n}", messages=(), domain="d") for n in range(PROMPTS)]


def rollout(prompt: Prompt, *, version: int, stops: bool) -> Rollout:
    ids = np.array([*WORDS.encode(prompt.id.encode()), WORDS.eos_id], dtype=np.int32)
    return Rollout(
        prompt=prompt,
        sample_index=0,
        prompt_ids=np.array([1], dtype=np.int32),
        token_ids=ids,
        loss_mask=np.ones(len(ids), dtype=bool),
        logprobs=np.zeros(len(ids), dtype=np.float32),
        byte_ends=WORDS.byte_ends(ids),
        response=prompt.id.encode(),
        policy_version=version,
        finish_reason="stop" if stops else "length",
    )


@dataclass
class Sampler:
    weather: Weather
    version: int = -1
    asked: list[tuple[int, int]] = field(default_factory=list)

    def generate(self, prompts: Sequence[Prompt], *, step: int, version: int) -> list[Rollout]:
        assert version == self.version, "weights changed under a sampler"
        self.asked.append((step, version))
        if self.weather.strikes(self.weather.failures / 8):
            raise Killed
        behind = 9 if self.weather.strikes(self.weather.failures / 8) else 0
        return [
            rollout(p, version=version - behind, stops=not self.weather.strikes(0.2))
            for p in prompts
        ]


@dataclass
class Pool:
    weather: Weather

    def score(self, rollouts: Sequence[Rollout]) -> list[dict[str, TeacherScores]]:
        if self.weather.strikes(self.weather.failures / 8):
            raise Killed
        return [{} for _ in rollouts]

    def latencies(self) -> dict[str, list[float]]:
        return {}

    def troubles(self) -> dict[str, int]:
        return {}


def start(folder: Path, weather: Weather) -> tuple[Ahead, Sampler, Ledger, Journal]:
    ledger, sampler = Ledger(), Sampler(weather)
    journal = Journal(folder / "rollouts-0.jsonl")
    gatherer = Gatherer(
        source=SimpleNamespace(take=prompts_of),  # type: ignore[arg-type]
        sampler=sampler,  # type: ignore[arg-type]
        pool=Pool(weather),  # type: ignore[arg-type]
        student=STUDENT,  # type: ignore[arg-type]
        journal=journal,
        replies=ReplyJournal(folder, 0, level="off", max_bytes=0),
        ledger=ledger,
        options=GatherOptions(
            dp_rank=0,
            dp_size=1,
            num_generations=1,
            max_new_tokens=20,
            seed=0,
            max_staleness=weather.lag,
            mask_truncated=True,
        ),
    )
    return Ahead(gatherer, lag=weather.lag, num_steps=STEPS), sampler, ledger, journal


def train(folder: Path, weather: Weather, saved: dict[str, Any], seen: list[str]) -> None:
    """The loop of `mopd.runtime.loop` without a model; raises Killed where the process would end.

    ``saved`` is the checkpoint, ``seen`` the answers trained since the start of the run.
    """
    ahead, sampler, ledger, journal = start(folder, weather)
    first = saved.get("step", 0)
    del seen[saved.get("seen", 0) :]
    journal.resume_from(first, size=PROMPTS)
    if "ledger" in saved:
        ledger.restore(saved["ledger"])
    try:
        push(ahead, sampler, first)
        ahead.start(first)
        for step in range(first, STEPS):
            gathered = ahead.take(step)
            assert gathered.step == step
            settle(ledger, gathered, weather, seen)
            push(ahead, sampler, step + 1)
            if weather.strikes(weather.failures / 8):
                raise Killed
            if (step + 1) % SAVE == 0:
                saved |= {"step": step + 1, "ledger": ledger.state(), "seen": len(seen)}
    finally:
        ahead.close()
        journal.close()


def push(ahead: Ahead, sampler: Sampler, version: int) -> None:
    ahead.before_push(version)
    sampler.version = version
    ahead.after_push(version)


def settle(ledger: Ledger, gathered: Gathered, weather: Weather, seen: list[str]) -> None:
    dropped = Counter(gathered.dropped)
    trained = [r.prompt.id for r in gathered.rollouts if r.loss_mask.any()]
    if weather.strikes(weather.failures / 4):
        dropped["skipped_step"] += len(trained)
        trained = []
    ledger.settle(gathered.step, trained=len(trained), dropped=dropped)
    seen += trained


def run_to_the_end(folder: Path, weather: Weather) -> tuple[dict[str, Any], list[str]]:
    saved: dict[str, Any] = {}
    seen: list[str] = []
    while True:
        try:
            train(folder, weather, saved, seen)
            return saved["ledger"], seen
        except Killed:
            weather.crashes += 1
            weather.failures = 0.0 if weather.crashes > 6 else weather.failures
            if weather.strikes(0.5):
                cut_an_append_short(folder / "rollouts-0.jsonl", weather)


def cut_an_append_short(path: Path, weather: Weather) -> None:
    """What is left of the lines of the next step when the process ends while it writes them."""
    steps = [step for step, _, _ in read_journal(path)] if path.stat().st_size else []
    step = max(steps, default=-1) + 1
    if step < STEPS:
        lines = "".join(
            json.dumps({"step": step, "prompt": p.id, "sample": 0}) + "\n" for p in prompts_of(step)
        )
        with path.open("a") as file:
            file.write(lines[: weather.random.randrange(len(lines))])


@pytest.mark.slow
def test_the_ledger_balances_over_1000_schedules(tmp_path: Path) -> None:
    reasons: Counter[str] = Counter()
    crashes = 0
    for number in range(SCHEDULES):
        draw = random.Random(number)
        weather = Weather(draw, lag=draw.choice([0, 1, 3]), failures=draw.choice([0.0, 0.5, 1.0]))
        folder = tmp_path / str(number)
        books, seen = run_to_the_end(folder, weather)
        assert (books["issued"], books["in_flight"]) == (STEPS * PROMPTS, 0)
        assert books["issued"] == books["trained"] + sum(books["dropped"].values())
        assert len(set(seen)) == len(seen) == books["trained"]
        assert sorted(read_journal(folder)) == [
            (step, p.id, 0) for step in range(STEPS) for p in prompts_of(step)
        ]
        lines = (folder / "rollouts-0.jsonl").read_text().splitlines()
        assert len(lines) == STEPS * PROMPTS  # each answer once
        reasons.update(books["dropped"])
        crashes += weather.crashes
    assert crashes > SCHEDULES / 2
    assert set(reasons) == {"stale", "truncated", "skipped_step"}


@pytest.mark.parametrize("lag", [1, 3])
def test_an_answer_is_exactly_so_many_versions_old(tmp_path: Path, lag: int) -> None:
    weather = Weather(random.Random(0), lag=lag)
    ahead, sampler, ledger, journal = start(tmp_path, weather)
    push(ahead, sampler, 0)
    ahead.start(0)
    for step in range(STEPS):
        gathered = ahead.take(step)
        settle(ledger, gathered, weather, [])
        push(ahead, sampler, step + 1)
    assert sampler.asked == [(step, max(0, step - lag)) for step in range(STEPS)]
    ahead.close()
    journal.close()


def test_an_error_in_the_thread_reaches_the_loop_with_its_type(tmp_path: Path) -> None:
    ahead, sampler, _, journal = start(tmp_path, Weather(random.Random(0), lag=1, failures=8.0))
    push(ahead, sampler, 0)
    ahead.start(0)
    for wait in (lambda: ahead.take(0), lambda: ahead.before_push(1)):
        with pytest.raises(Killed):
            wait()
    ahead.close()
    journal.close()


def test_a_lost_and_a_doubled_answer_are_refused() -> None:
    ledger = Ledger()
    ledger.issue(0, 3)
    with pytest.raises(MopdError, match="issued twice"):
        ledger.issue(0, 3)
    for trained in (2, 4):
        with pytest.raises(MopdError, match="step 0 issued 3 answers"):
            ledger.settle(0, trained=trained, dropped={})
        ledger._open[0] = 3
    ledger._issued += 1
    with pytest.raises(MopdError, match="4 answers issued"):
        ledger.state()


def test_ledgers_of_replicas_add_up() -> None:
    one = {"issued": 3, "trained": 1, "in_flight": 1, "dropped": {"stale": 1}}
    two = {"issued": 2, "trained": 0, "in_flight": 0, "dropped": {"stale": 1, "unscored": 1}}
    assert added([one, two]) == {
        "issued": 5,
        "trained": 1,
        "in_flight": 1,
        "dropped": {"stale": 2, "unscored": 1},
    }


def test_a_journal_of_other_prompts_is_refused(tmp_path: Path) -> None:
    weather = Weather(random.Random(0))
    _, _, _, journal = start(tmp_path, weather)
    journal.append(0, [rollout(p, version=0, stops=True) for p in prompts_of(7)])
    journal.close()
    ahead, _, _, journal = start(tmp_path, weather)
    journal.resume_from(0, size=PROMPTS)
    ahead.start(0)
    with pytest.raises(ArtifactError, match="other answers for step 0"):
        ahead.take(0)
    journal.close()
