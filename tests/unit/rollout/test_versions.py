"""Versions under every order of events: a model of trainers, servers and what is between them.

The decisions are the shipped ones (`ServedVersion` in a server, `VersionPolicy` in a trainer).
Around them everything may happen: updates are slow, fail, land by half or do not wait for what is
running, servers restart, strangers load weights, answers arrive late, a trainer resumes from an
older step.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from mopd.errors import StaleWeightsError
from mopd.rollout.versions import VersionPolicy
from mopd.serving.versions import ServedVersion, Ticket, is_version, make_version

INTERLEAVINGS = 10_000
EVENTS = 60
MIXED = "mixed"


@dataclass(eq=False)
class Request:
    """In a server: ``seen`` are the weights that its tokens were really sampled from."""

    asked: str
    ticket: Ticket
    seen: set[str | None] = field(default_factory=set)


@dataclass(eq=False)
class Server:
    weights: str | None = None  # what is in memory: a version, or half of one
    served: ServedVersion = field(default_factory=ServedVersion)
    running: list[Request] = field(default_factory=list)
    update: str | None = None  # that is being loaded


class World:
    """Trainer, servers and the answers under way; one random event after the other."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.servers = [Server() for _ in range(self.random.choice([1, 2]))]
        self.sessions = 0
        self.under_way: list[tuple[str, str | None, set[str | None]]] = []
        self.counts: Counter[str] = Counter()
        self.resume()
        for server in self.servers:
            server.weights = self.policy.wanted
            server.served.finish(server.weights)

    def resume(self) -> None:
        """Another process, from an older step; what the former one sent is still under way."""
        step = max(self.policy.step - self.random.randint(0, 2), 0) if self.sessions else 0
        self.sessions += 1
        self.policy = VersionPolicy(f"session{self.sessions}")
        self.policy.advance(step)

    def train(self) -> None:
        self.policy.advance(self.policy.step + 1)

    def push(self) -> None:
        server = self.random.choice(self.servers)
        if self.policy.action(server.served.current, patience=False) == "push":
            self.begin(server, self.policy.wanted)

    def intrude(self) -> None:
        self.begin(self.random.choice(self.servers), "stranger00/1")

    def begin(self, server: Server, version: str | None) -> None:
        if server.update is None:  # one at a time
            server.update = version
            server.served.begin()
            server.weights = MIXED

    def land(self) -> None:
        server = self.random.choice(self.servers)
        if server.update is not None:
            server.weights = server.update
            server.served.finish(server.update)
            server.update = None

    def fail(self) -> None:
        server = self.random.choice(self.servers)
        server.update = None  # half of it stays in memory

    def restart(self) -> None:
        server = self.random.choice(self.servers)
        for request in server.running:  # a reply may still be on its way
            self.deliver(server, request)
        self.servers[self.servers.index(server)] = Server()

    def ask(self) -> None:
        server = self.random.choice(self.servers)
        ticket, asked = server.served.ticket(), self.policy.asked(self.policy.step)
        if ticket.version == asked:  # else the server gives no answers
            server.running.append(Request(asked, ticket))

    def token(self) -> None:
        server = self.random.choice(self.servers)
        for request in server.running:
            request.seen.add(server.weights)

    def answer(self) -> None:
        server = self.random.choice(self.servers)
        if server.running:
            self.deliver(server, server.running.pop(self.random.randrange(len(server.running))))

    def deliver(self, server: Server, request: Request) -> None:
        if request.seen:
            stamp = server.served.stamp(request.ticket)
            self.under_way.append((request.asked, stamp, request.seen))

    def arrive(self) -> None:
        if self.under_way:
            asked, stamp, seen = self.under_way.pop(self.random.randrange(len(self.under_way)))
            mine = not self.policy.is_foreign(asked)  # nobody else's connections are its own
            if mine and self.policy.admits(asked, stamp):
                self.counts["admitted"] += 1
                self.counts["wrong"] += seen != {asked}
            else:
                self.counts["thrown away"] += 1

    def run(self) -> Counter[str]:
        frequent = [self.token] * 4 + [self.ask] * 4 + [self.answer] * 3 + [self.arrive] * 3
        rare = [self.push] * 2 + [self.land] * 2 + [self.fail, self.train, self.intrude]
        for _ in range(EVENTS):
            self.random.choice(frequent + rare)()
            if self.random.random() < 0.04:
                self.random.choice([self.resume, self.restart])()
        return self.counts


def test_no_answer_is_admitted_that_is_not_all_of_the_version_that_was_asked_for() -> None:
    counts: Counter[str] = Counter()
    for seed in range(INTERLEAVINGS):
        counts += World(seed).run()
    assert counts["wrong"] == 0
    # the model is not idle: both verdicts are common
    assert min(counts["admitted"], counts["thrown away"]) > INTERLEAVINGS // 4


MUTATIONS = {
    "no look after the answer": (ServedVersion, "stamp", lambda self, ticket: ticket.version),
    "the version alone, not what happened to it": (
        ServedVersion,
        "stamp",
        lambda self, ticket: self.current if ticket.version == self.current else None,
    ),
    "the old version until the new one is there": (ServedVersion, "begin", lambda self: None),
    "any stamp": (VersionPolicy, "admits", staticmethod(lambda asked, stamp: True)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_model_finds_what_is_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, mutated = MUTATIONS[name]
    monkeypatch.setattr(owner, method, mutated)
    assert any(World(seed).run()["wrong"] for seed in range(INTERLEAVINGS))


def test_versions_are_safe_paths() -> None:
    assert make_version("0123456789abcdef", 12) == "0123456789abcdef/12"
    for text in ("", "12", "../../etc/12", "0123456789/", "0123456789/-1", "0123456789/1/2", None):
        assert not is_version(text)
    with pytest.raises(ValueError, match="no version"):
        make_version("short", 1)


def test_a_stamp_needs_an_undisturbed_version() -> None:
    served = ServedVersion()
    assert served.stamp(served.ticket()) is None
    served.begin()
    served.finish("session00/1")
    ticket = served.ticket()
    assert served.stamp(ticket) == "session00/1"
    served.begin()
    assert served.current is None and served.stamp(ticket) is None
    served.finish("session00/1")  # the same weights once more: nobody knows what was in between
    assert served.stamp(ticket) is None


def test_what_a_trainer_makes_of_a_version() -> None:
    policy = VersionPolicy("session01")
    assert policy.wanted is None and policy.action(None, patience=False) == "push"
    assert policy.advance(3) == "session01/3"
    with pytest.raises(StaleWeightsError):
        policy.advance(3)
    with pytest.raises(StaleWeightsError):
        policy.asked(2)
    assert policy.asked(3) == "session01/3"
    assert policy.action("session01/3", patience=True) == "use"
    assert [policy.action(told, patience=True) for told in (None, "session00/3")] == ["push"] * 2
    follower = VersionPolicy("session01", pushes=False)
    follower.advance(3)
    assert follower.action("session01/2", patience=True) == "wait"
    assert follower.action("session01/2", patience=False) == "push"
    assert policy.is_foreign("session00/3") and not policy.is_foreign("session01/2")
