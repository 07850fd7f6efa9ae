"""The contract per position, each of its lines broken once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mopd.serving.reply import AMBIGUOUS, Entries
from mopd.teachers.admission import Admitted, admit

K, V = 4, 100
IDS = np.array([3, 5, 7, 20, 11, 12], dtype=np.int64)
PROMPT = 2  # the response is 7, 20, 11, 12

Lists = list[list[tuple[int, float]]]


def lists() -> Lists:
    """Token 20 is outside the top-k, the others are inside; the actual token comes first."""
    top = [-1.0, -1.5, -2.0, -3.0]
    found: Lists = [[], [(5, -1.0), (1, -1.5), (2, -2.0), (8, -3.0)]]
    for actual in IDS[PROMPT:].tolist():
        others = [40, 41, 42, 43]
        if actual == 20:
            found.append([(20, -4.0), *zip(others, top, strict=True)])
        else:
            found.append([(actual, top[1]), *zip(others[:3], [top[0], *top[2:]], strict=True)])
    return found


def entries(positions: Lists, echoed: np.ndarray | None = IDS) -> Entries:
    flat = [pair for position in positions for pair in position]
    return Entries(
        count=np.array([len(position) for position in positions]),
        ids=np.array([index for index, _ in flat], dtype=np.int64),
        logprobs=np.array([value for _, value in flat]),
        echoed=echoed,
    )


def judge(positions: Lists, echoed: np.ndarray | None = IDS, *, vocab_size: int = V) -> Admitted:
    return admit(entries(positions, echoed), ids=IDS, num_prompt=PROMPT, k=K, vocab_size=vocab_size)


def test_a_good_reply_is_believed() -> None:
    found = judge(lists())
    assert found.valid.all() and not found.missing
    assert found.topk_ids.dtype == np.int32 and found.topk_logprobs.dtype == np.float32
    assert found.topk_ids[0].tolist() == [40, 7, 41, 42]
    assert found.topk_ids[1].tolist() == [40, 41, 42, 43]
    assert found.logprobs.tolist() == [-1.5, -4.0, -1.5, -1.5]
    top = np.array([-1.0, -1.5, -2.0, -3.0])
    assert found.topk_logprobs.tolist() == [top.tolist()] * 4
    assert found.log_tail == pytest.approx(np.log1p(-np.exp(top).sum()), abs=1e-6)


def break_at(at: int, value: float) -> Callable[[Lists], None]:
    def edit(positions: Lists) -> None:
        positions[3][at] = (positions[3][at][0], value)

    return edit


def name_at(at: int, index: int) -> Callable[[Lists], None]:
    def edit(positions: Lists) -> None:
        positions[3][at] = (index, positions[3][at][1])

    return edit


def keep(count: int) -> Callable[[Lists], None]:
    def edit(positions: Lists) -> None:
        del positions[3][count:]

    return edit


BROKEN: dict[str, list[Callable[[Lists], None]]] = {
    "missing": [break_at(1, -9999.0), break_at(0, -9000.0), break_at(2, np.nan)],
    "positive": [break_at(1, 0.01)],
    "mass": [break_at(2, -0.2)],
    "order": [break_at(0, -2.5)],
    "vocabulary": [name_at(2, V), name_at(2, 2**40), name_at(2, -3)],
    "ambiguous": [name_at(2, AMBIGUOUS)],
    "repeated": [name_at(2, 40)],
    "echo": [name_at(0, 44)],
    "width": [keep(3), lambda p: p[3].append((50, -9.0))],
    "null": [keep(0)],
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_position_is_missing_and_the_others_are_not(reason: str) -> None:
    clean = judge(lists())
    for edit in BROKEN[reason]:
        positions = lists()
        edit(positions)
        found = judge(positions)
        assert found.missing == {reason: 1}
        assert found.valid.tolist() == [True, False, True, True]
        assert np.isnan(found.logprobs[1]) and np.isnan(found.log_tail[1])
        assert (found.topk_ids[1] == -1).all() and np.isnan(found.topk_logprobs[1]).all()
        for name in ("logprobs", "topk_ids", "topk_logprobs", "log_tail"):
            mine, true = getattr(found, name), getattr(clean, name)
            assert mine[[0, 2, 3]].tobytes() == true[[0, 2, 3]].tobytes()


@pytest.mark.parametrize("value", [np.inf, 1e308])
def test_infinities_are_never_values(value: float) -> None:
    for sign in (1.0, -1.0):
        positions = lists()
        break_at(1, sign * value)(positions)
        assert judge(positions).valid.tolist() == [True, False, True, True]


def test_the_length_and_the_echo_count_for_the_whole_answer() -> None:
    assert judge(lists()[:-1]).missing == {"length": 4}
    assert judge([*lists(), []]).missing == {"length": 4}
    other = IDS.copy()
    other[0] += 1
    assert judge(lists(), other).missing == {"echo": 4}
    assert judge(lists(), IDS[:-1]).missing == {"echo": 4}
    assert judge(lists(), None).valid.all()


def test_what_is_wrong_in_the_prompt_is_nobodys_concern() -> None:
    positions = lists()
    positions[1] = [(99999, 5.0)]
    assert judge(positions).valid.all()


def test_rounding_is_not_a_breach() -> None:
    positions = lists()
    positions[2] = [(7, 5e-4), (40, -50.0), (41, -50.0), (42, -50.0)]
    found = judge(positions)
    assert found.valid.all()
    assert found.logprobs[0] == 0.0 and found.topk_logprobs[0, 0] == 0.0
    assert np.isfinite(found.log_tail).all() and found.log_tail[0] < -15


def test_the_tail_holds_at_least_the_actual_token() -> None:
    positions = lists()
    probability = (1 - 1e-9) / K
    positions[3] = [(20, -12.0), *((40 + i, float(np.log(probability))) for i in range(K))]
    assert judge(positions).log_tail[1] == np.float32(-12.0)


def test_the_whole_vocabulary_has_no_tail() -> None:
    ids = np.array([0, 1])
    said = entries([[], [(1, np.log(0.75)), (0, np.log(0.25))]], None)
    found = admit(said, ids=ids, num_prompt=1, k=2, vocab_size=2)
    assert found.valid.all() and np.isneginf(found.log_tail).all()
