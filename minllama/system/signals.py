"""Ctrl-C, SIGTERM and a closed terminal: a handler sets a flag, which loops read between steps."""

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
LAUNCHER_REPEATS = 5.0  # seconds in which torchrun may deliver the terminal's Ctrl-C once more


@dataclass
class StopRequest:
    """Whether the user asked to stop.

    A second signal finds Python's own handlers restored and ends the process at once. Under a
    launcher one signal may arrive twice: there a second one counts after `repeats` seconds.
    """

    signal_number: int | None = None
    failure: str | None = None  # why to stop, if not by a signal: save, then fail with this
    previous: dict[int, Any] = field(default_factory=dict)  # handlers, by the signal's number
    repeats: float = 0.0
    silent: bool = False  # on all ranks but the first

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal_number is not None

    @property
    def exit_status(self) -> int:
        """The shell's convention for a process ended by a signal: 130 for Ctrl-C, 143 for TERM."""
        return 128 + (self.signal_number or 0)

    def fail(self, failure: str) -> None:
        """Ask to stop because the run cannot continue, though its progress can be saved."""
        self.failure, self.signal_number = failure, signal.SIGTERM

    def check(self) -> None:
        """Raise Interrupted if a signal has come; for work that has nothing to save."""
        if self.requested:
            raise Interrupted

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals within the block; under nohup SIGHUP stays ignored."""
        since = 0.0  # when the first signal came, by the monotonic clock

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
                # os.write: the signal may have come within a print; stderr may be gone (SIGHUP)
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
