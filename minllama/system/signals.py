"""Ctrl-C, SIGTERM and a closed terminal: the handler sets a flag, loops read it between steps."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from minllama.system.errors import Interrupted

HANDLED = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
LAUNCHER_REPEATS = 5.0  # seconds in which a launcher may deliver the terminal's Ctrl-C once more


@dataclass
class StopRequest:
    """Whether the user asked to stop.

    A second signal finds Python's own handlers restored and ends the process at once. Under a
    launcher the same signal may arrive twice, so there only one after `repeats` seconds counts.
    """

    signal_number: int | None = None
    failure: str | None = None  # why, where it was no signal: save, then fail with it
    previous: dict[int, Any] = field(default_factory=dict)
    repeats: float = 0.0
    silent: bool = False

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal_number is not None

    @property
    def exit_status(self) -> int:
        """What a shell expects of a process ended by that signal: 130 for Ctrl-C, 143 for TERM."""
        return 128 + (self.signal_number or 0)

    def fail(self, failure: str) -> None:
        """Ask to stop since the run cannot go on, though what it has made can be saved."""
        self.failure, self.signal_number = failure, signal.SIGTERM

    def check(self) -> None:
        """Raise Interrupted if a signal has come: for work that has nothing to save."""
        if self.requested:
            raise Interrupted

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals within the block; under nohup SIGHUP stays ignored."""
        since = 0.0

        def handle(signal_number: int, frame: Any) -> None:
            nonlocal since
            if since and time.monotonic() - since < self.repeats:
                return
            if since or not self.repeats:
                self.restore()
            if since:
                signal.raise_signal(signal_number)
            self.signal_number, since = signal_number, time.monotonic()
            if not self.silent:
                # os.write, since a signal may arrive inside print; stderr may be gone (SIGHUP)
                with contextlib.suppress(OSError):
                    os.write(2, b"\nstopping after this step; press Ctrl-C again to quit at once\n")

        for name in HANDLED:
            number = getattr(signal, name, None)
            if number and not (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                self.previous[number] = signal.signal(number, handle)
        try:
            yield self
        finally:
            self.restore()

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        while self.previous:
            number, handler = self.previous.popitem()
            signal.signal(number, handler)
