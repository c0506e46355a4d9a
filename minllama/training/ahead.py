"""Work that is done ahead: what step N + 1 needs is made in a thread while step N uses its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """What `make(number)` returns, for numbers in a row, each made while the one before is used.

    `make` has to be a function of its number alone, and runs in one thread within the block, never
    twice at once. Outside of the block, or not `enabled`, each is made when it is asked for.
    """

    def __init__(self, make: Callable[[int], T], *, enabled: bool) -> None:
        self.make, self.enabled = make, enabled
        self.thread: ThreadPoolExecutor | None = None
        self.next: tuple[int, Future[T]] | None = None

    def get(self, number: int, *, more: bool) -> T:
        """What is made of `number`, and with `more` begin with the next.

        What making it raised is raised here, however long ago that was. Another number than the
        next one is made anew.
        """
        if self.thread is None:
            return self.make(number)
        ahead, self.next = self.next, None
        if ahead is None or ahead[0] != number:
            ahead = (number, self.thread.submit(self.make, number))
        found = ahead[1].result()
        if more:
            self.next = (number + 1, self.thread.submit(self.make, number + 1))
        return found

    def __enter__(self) -> Ahead[T]:
        if self.enabled:
            self.thread = ThreadPoolExecutor(1, "ahead")
        return self

    def __exit__(self, *_: Any) -> None:
        thread, self.thread, self.next = self.thread, None, None
        if thread is not None:
            thread.shutdown(cancel_futures=True)
