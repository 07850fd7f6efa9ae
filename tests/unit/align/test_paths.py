"""Path targets against a walk through dictionaries, one boundary and one piece at a time."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from mopd.align.paths import PathOptions, trie_index
from mopd.align.payload import PayloadOptions
from mopd.types import FibreTrie, TeacherScores
from tests.helpers.payloads import MAX_LENGTH, Problem, random_problem

VOCABULARIES = [
    (["13", "12", "123", "1234"], ["3x", "13x"], "1234x"),
    (["vi", "vibi", " vibi", " x"], [" vi", "bi"], "vibx "),
    (["23", "123"], ["3"], "123"),
    (["abcd", "abcc", "bc"], ["ab", "cd"], "abcd"),
]


def problem_of(number: int) -> Problem:
    return random_problem(*VOCABULARIES[number], seed=number)


@pytest.mark.parametrize("number", range(len(VOCABULARIES)))
def test_the_tables_know_every_path_and_no_other(number: int) -> None:
    problem = problem_of(number)
    trie = problem.projection.trie
    index, paths = trie_index(trie, problem.projection.fold), trie.paths()
    assert number != 0 or max(len(path) for path in paths) > 1
    pieces = np.arange(problem.teacher.size)
    assert index.root.tolist() == [paths.get((t,), -1) for t in pieces.tolist()]
    for path, node in paths.items():
        found = index.children(np.full(len(pieces), node), pieces)
        assert found.tolist() == [paths.get((*path, t), -1) for t in pieces.tolist()]
    assert (index.children(np.full(len(pieces), -1), pieces) == -1).all()


Slots = dict[int, tuple[float, frozenset[int]]]


class Walk:
    """The slots of one boundary: first member -> (mass, members)."""

    def __init__(self, problem: Problem, scores: TeacherScores, row: int) -> None:
        self.trie: FibreTrie = problem.projection.trie
        self.fold = problem.projection.fold
        self.paths = self.trie.paths()
        self.scores, self.row = scores, row
        self.mass: defaultdict[int, float] = defaultdict(float)
        self.members: defaultdict[int, set[int]] = defaultdict(set)
        self.ids = scores.token_ids.tolist()
        self._walk()

    def listed(self, row: int) -> dict[int, float]:
        assert self.scores.topk_ids is not None
        probs = np.exp(self.scores.topk_logprobs[row].astype(np.float64)).tolist()
        pairs = zip(self.scores.topk_ids[row].tolist(), probs, strict=True)
        return {token: prob for token, prob in pairs if token >= 0}

    def node(self, length: int) -> int:
        end = self.row + length
        if end >= len(self.ids) or not self.scores.valid[end]:
            return -1
        return self.paths.get(tuple(self.ids[self.row : end]), -1)

    def put(self, slot: int | None, key: int | None, mass: float) -> None:
        if slot is not None and key is not None:
            self.mass[slot] += mass
            self.members[slot].add(key)

    def stop(self, node: int) -> int | None:
        token = int(self.trie.stop_token[node])
        return -1 - token if token >= 0 else None

    def groups(self, node: int) -> range:
        return range(self.trie.group_ptr[node], self.trie.group_ptr[node + 1])

    def _walk(self) -> None:
        node = self.node(1)
        if node < 0:
            return
        actual = self.ids[self.row]
        own = float(np.exp(np.float64(self.scores.logprobs[self.row])))
        same = [t for t in range(len(self.fold)) if self.fold[t] == self.fold[actual]]
        row = self.listed(self.row)
        reach = own / (own + sum(row.get(t, 0.0) for t in same if t != actual))
        stop = self.stop(node)
        self.put(stop, stop, 1.0 - reach)
        for token in same:
            other = self.paths.get((token,), -1)
            for group in self.groups(other) if other >= 0 and other != node else ():
                self.put(stop, group, 0.0)
        for length in range(1, MAX_LENGTH):
            row = self.listed(self.row + length)
            following = self.node(length + 1)
            onward, left = 0.0, 1.0
            for group in self.groups(node):
                piece = int(self.trie.group_piece[group])
                prob = row.get(piece, 0.0)
                left -= prob
                if following >= 0 and piece == self.ids[self.row + length]:
                    onward = prob
                elif self.trie.group_open[group]:
                    self.put(stop, group, reach * prob)
                else:
                    self.put(group, group, reach * prob)
            self.put(stop, stop, reach * max(left, 0.0))
            if following < 0:
                return
            node, reach = following, reach * onward
            own_stop = self.stop(node)
            stop = stop if own_stop is None else own_stop


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("k", [2, 9])
@pytest.mark.parametrize("number", range(len(VOCABULARIES)))
def test_random_texts_52_54(number: int, k: int, failed: bool) -> None:
    problem = problem_of(number)
    scores = problem.listed(k)
    if failed:
        scores = replace(scores, valid=np.arange(len(scores.valid)) % 7 != 3)
    projection = problem.projection
    path = PathOptions(trie=projection.trie, fold=projection.fold, max_length=MAX_LENGTH)
    rows = problem.rows(scores, PayloadOptions(temperature=1.0, fold=projection.fold, path=path))
    begin = dict(
        zip(
            problem.alignment.student_starts[:-1].tolist(),
            problem.alignment.teacher_starts[:-1].tolist(),
            strict=True,
        )
    )
    walks = {p: Walk(problem, scores, begin[p]) for p in rows.position.tolist()}
    expected = {p: walk for p, walk in walks.items() if walk.members}
    assert rows.path_position.tolist() == sorted(expected)
    assert failed or len(expected) > 5
    for q, position in enumerate(rows.path_position.tolist()):
        walk = expected[position]
        total = sum(walk.mass.values())
        assert rows.path_weight[q] == pytest.approx(min(total, 1.0), abs=1e-6)
        found = {
            frozenset(rows.path_entry[rows.path_entry_slot == slot].tolist()): target
            for slot, target in enumerate(rows.path_target)
            if rows.path_offsets[q] <= slot < rows.path_offsets[q + 1]
        }
        wanted = {
            frozenset(members): walk.mass[slot] / total for slot, members in walk.members.items()
        }
        assert found == pytest.approx(wanted, abs=1e-6)
