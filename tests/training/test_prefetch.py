"""minllama/training/ahead.py: what is made in a thread, when, and where its errors come up."""

from __future__ import annotations

import threading

import pytest

from minllama.system.errors import TextLost
from minllama.training.loop import Prefetch


def test_the_next_is_made_while_one_is_used() -> None:
    """In another thread, which ends with the block; and none beyond the last."""
    begun, made = {number: threading.Event() for number in range(5)}, []

    def make(number: int) -> int:
        begun[number].set()
        made.append(threading.current_thread())
        return 10 * number

    ahead = Prefetch(make, enabled=True)
    with ahead:
        for number in range(3):
            assert ahead.get(number, prefetch_next=number < 2) == 10 * number
            assert number == 2 or begun[number + 1].wait(10)
    assert not begun[3].is_set() and len(made) == 3
    assert len(set(made)) == 1 and made[0] is not threading.main_thread()
    assert not made[0].is_alive()


@pytest.mark.parametrize("enabled", [True, False])
def test_another_number_than_the_next_is_made_anew(enabled: bool) -> None:
    """After a rollback, say; each is made once, by its number alone."""
    made = []
    with Prefetch(lambda number: made.append(number) or number, enabled=enabled) as ahead:
        for number in (5, 6, 2, 3):
            assert ahead.get(number, prefetch_next=number != 3) == number
    assert made == ([5, 6, 7, 2, 3] if enabled else [5, 6, 2, 3])


def test_an_error_comes_up_where_its_number_is_asked_for() -> None:
    """Not a step early, and again if it is asked for again; one that nobody asks for never does."""

    def make(number: int) -> int:
        if number >= 1:
            raise TextLost(f"chunk {number}")
        return number

    with Prefetch(make, enabled=True) as ahead:
        assert ahead.get(0, prefetch_next=True) == 0
        for _ in range(2):
            with pytest.raises(TextLost, match="chunk 1"):
                ahead.get(1, prefetch_next=True)
        assert ahead.get(0, prefetch_next=True) == 0


def test_outside_of_the_block_nothing_is_ahead() -> None:
    """Each is made when it is asked for: before the loop, and after it."""
    ahead = Prefetch(lambda number: threading.current_thread(), enabled=True)
    with ahead:
        assert ahead.get(0, prefetch_next=True) is not threading.main_thread()
    assert ahead.get(1, prefetch_next=True) is threading.main_thread()
