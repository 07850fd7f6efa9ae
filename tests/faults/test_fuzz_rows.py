"""Fuzzed messages of `mopd serve`: nothing out of contract is believed, all of it is counted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mopd.demo import World
from mopd.tokens.chat import ChatTokenizer
from mopd.types import TeacherScores
from tests.faults.families import ROWS_CONTENT, ROWS_WIRE, Bend, bent
from tests.faults.test_fuzz import check_contract, same
from tests.helpers.stub_scorers import PrefixScorer
from tests.helpers.stub_server import Fault, StubOptions, StubServer
from tests.helpers.teachers import make_rollout_of, remote_teacher

SEEDS = 12
VICTIM = 1


class Setting:
    """One teacher, one server, and what it says when nothing is wrong."""

    def __init__(self, world: World, *, prompts_per_request: int) -> None:
        student = ChatTokenizer.load(world.student)
        tokenizer = ChatTokenizer.load(world.teachers["sort"])
        self.options = StubOptions()
        self.server = StubServer(PrefixScorer(tokenizer.vocabulary.size), self.options)
        self.server.__enter__()
        self.teacher = remote_teacher(
            [self.server.url],
            tokenizer=tokenizer,
            student=student,
            shape="mopd",
            endpoint={"temperature": 2.0},
            retry={"max_retries": 2, "prompts_per_request": prompts_per_request},
        )
        answers = (b"bo 12", b"1 2 3 4 5 6 7", b"zyx", b"ka")
        self.rollouts = [make_rollout_of(student, answer) for answer in answers]
        self.clean = self.teacher.score(self.rollouts)

    def close(self) -> None:
        self.teacher.close()
        self.server.stop()

    def score(self, bend: Bend, rng: random.Random, *, lasting: bool) -> list[TeacherScores]:
        """With the messages that begin with the victim bent: always, or once."""
        first = len(self.server.requests)
        wanted = len(self.clean[VICTIM].token_ids)

        def fault(number: int, request: dict[str, Any]) -> Fault | None:
            counts = [len(s["ids"]) - s["start"] for s in request["sequences"]]
            mine = counts == [wanted] if lasting else number == first
            return bent(rng, bend) if mine else None

        self.teacher.missing.clear()
        self.teacher.events.clear()
        self.options.fault = fault
        try:
            return self.teacher.score(self.rollouts)
        finally:
            self.options.fault = lambda number, request: None


@pytest.fixture(scope="module")
def alone(tiny_world: World) -> Iterator[Setting]:
    """One answer a request, so that a fault meets it and no other."""
    found = Setting(tiny_world, prompts_per_request=1)
    yield found
    found.close()


@pytest.fixture(scope="module")
def paired(tiny_world: World) -> Iterator[Setting]:
    found = Setting(tiny_world, prompts_per_request=2)
    yield found
    found.close()


@pytest.mark.parametrize("family", ROWS_CONTENT)
def test_a_broken_row_is_missing(alone: Setting, family: str) -> None:
    setting = alone
    for seed in range(SEEDS):
        rng = random.Random(f"{family} {seed}")
        found = setting.score(ROWS_CONTENT[family], rng, lasting=True)
        for i, (one, two) in enumerate(zip(found, setting.clean, strict=True)):
            check_contract(setting.teacher, one, setting.rollouts[i])
            assert one.lse is not None and two.lse is not None
            assert np.isfinite(one.lse[one.valid]).all() and np.isnan(one.lse[~one.valid]).all()
            if i != VICTIM:
                assert same(one, two), (family, seed)
        one, two = found[VICTIM], setting.clean[VICTIM]
        assert not one.valid.all(), (family, seed)
        assert setting.teacher.missing.total() == (~one.valid).sum()
        kept = one.valid
        if family != "shifted":
            for name in ("logprobs", "topk_logprobs", "topk_ids", "log_tail", "lse"):
                mine, true = getattr(one, name)[kept], getattr(two, name)[kept]
                assert mine.tobytes() == true.tobytes(), (family, seed, name)


@pytest.mark.parametrize("family", ROWS_WIRE)
def test_a_broken_message_is_mended_by_another(paired: Setting, family: str) -> None:
    setting = paired
    for seed in range(SEEDS):
        rng = random.Random(f"{family} {seed}")
        found = setting.score(ROWS_WIRE[family], rng, lasting=False)
        assert setting.teacher.events.total() > 0, (family, seed)
        assert not setting.teacher.missing
        assert all(same(a, b) for a, b in zip(found, setting.clean, strict=True)), (family, seed)
