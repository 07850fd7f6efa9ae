"""Fuzzed replies: nothing crashes, nothing out of contract is believed, all of it is counted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mopd.demo import World
from mopd.teachers.base import teacher_input
from mopd.teachers.remote import RemoteTeacher
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Rollout, TeacherScores
from tests.faults.families import CONTENT, WIRE, edited
from tests.helpers.stub_scorers import PrefixScorer
from tests.helpers.stub_server import Fault, StubOptions, StubServer
from tests.helpers.stub_shapes import COMPLETIONS
from tests.helpers.teachers import make_rollout_of, remote_teacher

SEEDS = 25
VICTIM = 1


class Setting:
    """One teacher, one server, and what it says when nothing is wrong."""

    def __init__(self, world: World) -> None:
        student = ChatTokenizer.load(world.student)
        tokenizer = ChatTokenizer.load(world.teachers["sort"])
        self.options = StubOptions()
        self.server = StubServer(PrefixScorer(tokenizer.vocabulary.size), self.options)
        self.server.__enter__()
        self.teacher = remote_teacher(
            [self.server.url], tokenizer=tokenizer, student=student, retry={"max_retries": 2}
        )
        contents = ("bo 12 ka", "3 1 2", "x y z", "bo bo")
        answers = (b"bo 12", b"1 2 3 4 5 6 7", b"zyx", b"ka")
        self.rollouts = [
            make_rollout_of(student, answer, content=content)
            for content, answer in zip(contents, answers, strict=True)
        ]
        read = teacher_input(self.rollouts[VICTIM], tokenizer, student=student)
        self.victim = [*read.prompt_ids.tolist(), *read.token_ids.tolist()]
        self.clean = self.teacher.score(self.rollouts)

    def score(self) -> tuple[list[TeacherScores], int]:
        """Scores, and how many things were counted."""
        self.teacher.missing.clear()
        self.teacher.events.clear()
        found = self.teacher.score(self.rollouts)
        return found, self.teacher.missing.total() + self.teacher.events.total()


@pytest.fixture(scope="module")
def setting(tiny_world: World) -> Iterator[Setting]:
    found = Setting(tiny_world)
    yield found
    found.teacher.close()
    found.server.stop()


def same(one: TeacherScores, two: TeacherScores) -> bool:
    """Bitwise."""
    pairs = [
        (one.logprobs, two.logprobs),
        (one.topk_ids, two.topk_ids),
        (one.topk_logprobs, two.topk_logprobs),
        (one.log_tail, two.log_tail),
        (one.valid, two.valid),
    ]
    return all(a is not None and b is not None and a.tobytes() == b.tobytes() for a, b in pairs)


def check_contract(teacher: RemoteTeacher, scores: TeacherScores, rollout: Rollout) -> None:
    """Rows that are believed obey the contract; the others hold nothing that looks like a value."""
    ok = scores.valid
    size = teacher.tokenizer.vocabulary.size
    assert scores.topk_ids is not None
    assert len(ok) == len(scores.token_ids)
    assert np.isnan(scores.logprobs[~ok]).all() and np.isnan(scores.log_tail[~ok]).all()
    assert np.isnan(scores.topk_logprobs[~ok]).all() and (scores.topk_ids[~ok] == -1).all()
    listed = scores.topk_logprobs[ok]
    assert np.isfinite(listed).all() and (listed <= 0).all() and (listed > -9000).all()
    assert np.isfinite(scores.logprobs[ok]).all() and np.isfinite(scores.log_tail[ok]).all()
    assert (scores.topk_ids[ok] >= 0).all() and (scores.topk_ids[ok] < size).all()
    assert (np.exp(listed.astype(np.float64)).sum(1) <= 1 + 1e-3).all()
    ranked = np.sort(scores.topk_ids[ok], axis=1)
    assert (ranked[:, 1:] > ranked[:, :-1]).all()


@pytest.mark.parametrize("family", CONTENT)
def test_a_broken_answer_spoils_no_other(setting: Setting, family: str) -> None:
    for seed in range(SEEDS):
        rng = random.Random(f"{family} {seed}")
        # every time that answer is asked for, or the first time only
        lasting = bool(seed % 2)
        first = len(setting.server.requests)

        def fault(
            number: int,
            request: dict[str, Any],
            rng: random.Random = rng,
            when: tuple[bool, int] = (lasting, first),
        ) -> Fault | None:
            if setting.victim in request["prompt"] and (when[0] or number == when[1]):
                return edited(rng, CONTENT[family], setting.victim)
            return None

        setting.options.fault = fault
        found, counted = setting.score()
        setting.options.fault = lambda number, request: None
        for i, (one, two) in enumerate(zip(found, setting.clean, strict=True)):
            check_contract(setting.teacher, one, setting.rollouts[i])
            if i != VICTIM:
                assert same(one, two), (family, seed)
        changed = not same(found[VICTIM], setting.clean[VICTIM])
        # what is not believed is counted; a fault in the prompt's part is nobody's concern
        assert counted > 0 or not changed, (family, seed)
        kept = found[VICTIM].valid
        for name in ("logprobs", "topk_logprobs", "topk_ids"):
            mine, true = getattr(found[VICTIM], name), getattr(setting.clean[VICTIM], name)
            if family not in ("permuted", "shifted"):
                assert mine[kept].tobytes() == true[kept].tobytes(), (family, seed, name)
        assert counted == 0 or lasting or counted >= 1


@pytest.mark.parametrize("family", WIRE)
def test_a_broken_exchange_is_mended_by_another(setting: Setting, family: str) -> None:
    for seed in range(SEEDS):
        rng = random.Random(f"{family} {seed}")
        first = len(setting.server.requests)

        def fault(
            number: int, request: dict[str, Any], rng: random.Random = rng, first: int = first
        ) -> Fault | None:
            return WIRE[family](rng) if number == first else None

        setting.options.fault = fault
        found, counted = setting.score()
        setting.options.fault = lambda number, request: None
        assert counted == setting.teacher.events.total() > 0, (family, seed)
        assert all(same(a, b) for a, b in zip(found, setting.clean, strict=True)), (family, seed)


def test_there_are_enough_families() -> None:
    assert len(CONTENT) + len(WIRE) >= 20


def test_every_content_family_changes_the_reply(setting: Setting) -> None:
    """Otherwise a family tests nothing."""
    for family, edit in CONTENT.items():
        reply = setting.server._reply(
            COMPLETIONS, {"prompt": [setting.victim], "prompt_logprobs": 8, "temperature": 1.0}
        )
        before = repr(reply)
        edit(random.Random(0), reply["choices"][0])
        assert repr(reply) != before, family
