"""Trainings whose teacher is killed, hung and started again under way, and what is compared."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopd.demo import World
from mopd.tokens.chat import ChatTokenizer
from tests.helpers.runs import start, step_lines, words
from tests.helpers.stub_process import StubProcess

DEADLINE_S = 6.0
STALL_S = 2 * DEADLINE_S - 1.0  # less than two in a row
DELAY_S = 0.1  # of a request: so that most kills hit one
STEP_S = 0.2  # about what a step takes
SAVE_INTERVAL = 4
GIVE_UP_S = 240.0


@dataclass(frozen=True, kw_only=True)
class Blow:
    """What happens to a replica once ``step`` steps and ``delay_s`` more have passed."""

    step: int
    delay_s: float
    replica: int
    hang: bool  # stopped and never going on, instead of killed
    back: int  # is started again after so many steps, of which one at least was without it


def blows(seed: int, *, steps: int, number: int, hangs: bool = False) -> list[Blow]:
    """Spread over the run; one replica is back before the other is hit."""
    rng = random.Random(seed)
    each = (steps - 4) // number
    return [
        Blow(
            step=2 + i * each + rng.randrange(max(1, each // 3)),
            delay_s=rng.uniform(0.0, STEP_S),
            replica=rng.randrange(2),
            hang=hangs and rng.random() < 0.4,
            back=rng.randrange(2, max(3, each // 2)),
        )
        for i in range(number)
    ]


def stub(world: World, *, scored_by_model: bool = False, delay_s: float = DELAY_S) -> StubProcess:
    """A server of the teacher `sort`."""
    directory = world.teachers["sort"]
    return StubProcess(
        vocab_size=ChatTokenizer.load(directory).vocabulary.size,
        model=directory if scored_by_model else None,
        delay_s=delay_s,
    )


def run_words(
    world: World, directory: Path, name: str, stubs: Sequence[StubProcess], **keys: Any
) -> list[str]:
    """A run whose teacher `sort` is behind ``stubs``, asked for one answer at a time."""
    backend: dict[str, Any] = {
        "type": "vllm",
        "urls": "[" + ",".join(stub.url for stub in stubs) + "]",
        "deadline_s": DEADLINE_S,
        "entries_per_request": 1000,
    }
    settings = {f"teachers__sort__backend__{key}": value for key, value in backend.items()}
    settings |= {"checkpoint__save_interval": SAVE_INTERVAL, "logging__tensorboard": "false"}
    return words(world, directory, name, **(settings | keys))


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A run that is over."""

    code: int
    errors: str


def disturbed(
    overrides: list[str], run: Path, stubs: Sequence[StubProcess], plan: Sequence[Blow]
) -> Ended:
    """Runs to the end, with every blow on the way."""
    process = start("mopd_ctkd", overrides)
    try:
        for blow in plan:
            if not reached(process, run, blow.step):
                break
            time.sleep(blow.delay_s)
            replica = stubs[blow.replica]
            replica.hang() if blow.hang else replica.kill()
            reached(process, run, steps_of(run) + blow.back)
            replica.kill()
            replica.start()
            replica.wait()
        _, errors = process.communicate(timeout=GIVE_UP_S)
    finally:
        process.kill()
        process.communicate()
    return Ended(code=process.returncode, errors=errors)


def reached(process: Any, run: Path, step: int) -> bool:
    """Waits until so many steps are logged; False: the run ended before."""
    end = time.monotonic() + GIVE_UP_S
    while steps_of(run) < step:
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, f"step {step} was never reached"
        time.sleep(0.005)
    return True


def steps_of(run: Path) -> int:
    """How many are logged."""
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def lines(run: Path) -> list[dict[str, Any]]:
    """What was computed, bit by bit: the metrics without times and failed requests."""
    return [
        {key: value for key, value in line.items() if not key.startswith("requests/")}
        for line in step_lines(run)
    ]


def failures(run: Path) -> Counter[str]:
    """Failed requests by reason."""
    found: Counter[str] = Counter()
    for line in step_lines(run):
        found.update({k.split("/")[-1]: v for k, v in line.items() if k.startswith("requests/")})
    return found


def longest_step(run: Path) -> float:
    text = (run / "metrics.jsonl").read_text()
    return max(json.loads(line)["time/step"] for line in text.splitlines())


def journal(run: Path) -> list[tuple[int, str, int]]:
    """(step, prompt, sample) of every line, in order."""
    text = (run / "journal" / "rollouts-0.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    return [(record["step"], record["prompt"], record["sample"]) for record in records]


def weights(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "hf").glob("*.safetensors"))}


def assert_equal_runs(run: Path, clean: Path, *, steps: int, prompts_per_step: int = 8) -> None:
    """Nothing lost, nothing twice, every number and weight the same."""
    asked = journal(run)
    assert len(asked) == len(set(asked)) == steps * prompts_per_step
    assert asked == journal(clean)
    assert [line["step"] for line in lines(run)] == list(range(steps))
    assert lines(run) == lines(clean)
    assert weights(run) and weights(run) == weights(clean)
