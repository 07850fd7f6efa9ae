"""A line of threads: first come, first served, and who leaves holds nobody up."""

from __future__ import annotations

import threading
import time

import pytest

from mopd.serving.first_come import FirstCome, NoTurnError


def never() -> bool:
    return False


def test_turns_are_taken_in_the_order_of_arrival_one_at_a_time() -> None:
    turns, order, inside = FirstCome(), list[int](), list[int]()

    def work(number: int) -> None:
        with turns.turn(gives_up=never):
            inside.append(number)
            assert inside == [number]
            order.append(number)
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    with turns.turn(gives_up=never):
        for size, thread in enumerate(threads, start=2):
            thread.start()
            while len(turns._line) < size:
                time.sleep(0.001)
        assert order == []
    for thread in threads:
        thread.join(10.0)
    assert order == list(range(8))


def test_who_gives_up_leaves_the_line_and_errors_end_a_turn() -> None:
    turns = FirstCome()
    with turns.turn(gives_up=never), pytest.raises(NoTurnError):
        turns.turn(gives_up=lambda: True).__enter__()
    with pytest.raises(ValueError, match="inside"), turns.turn(gives_up=never):
        raise ValueError("inside")
    with turns.turn(gives_up=lambda: True):  # free, so there is nothing to wait for
        pass
