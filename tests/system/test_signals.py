"""minllama/system/signals.py: Ctrl-C and its like as a request that loops read."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from minllama.system import signals
from minllama.system.errors import Interrupted
from minllama.system.signals import StopRequest


class Quit(Exception):
    """What the handler that was there before raises."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Handlers that raise Quit are those of whoever calls; Python's own come back."""

    def quit_at_once(number: int, frame: object) -> None:
        raise Quit

    numbers = [getattr(signal, name) for name in signals.HANDLED if hasattr(signal, name)]
    before = {number: signal.signal(number, quit_at_once) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_the_first_signal_asks_and_the_second_quits(
    capfd: pytest.CaptureFixture, name: str, status: int
) -> None:
    """A step is finished and saved; whoever is in a hurry presses Ctrl-C again."""
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"no {name} here")
    stop = StopRequest()
    with stop.listening():
        stop.check()
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested and stop.exit_status == status
        assert "press Ctrl-C again to quit at once" in capfd.readouterr().err
        with pytest.raises(Interrupted):
            stop.check()
        with pytest.raises(Quit):
            signal.raise_signal(signal.SIGINT)


def test_the_handlers_come_back() -> None:
    """After the block, also one that an error ended, a signal is the caller's again."""
    stop = StopRequest()
    with pytest.raises(ZeroDivisionError), stop.listening():
        raise ZeroDivisionError
    with pytest.raises(Quit):
        signal.raise_signal(signal.SIGINT)
    assert not stop.requested


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_nohup_is_respected() -> None:
    """A run started under nohup outlives its terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    with stop.listening():
        signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_launcher_may_deliver_ctrl_c_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal sends it to the whole group, then torchrun once more: that is no second one."""
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    stop = StopRequest(repeats=5.0)
    with stop.listening():
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
            now += 1
        assert stop.exit_status == 130
        now += 5
        with pytest.raises(Quit):
            signal.raise_signal(signal.SIGINT)


def test_a_terminal_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """SIGHUP comes when stderr cannot be written; one rank of several says it for all."""

    def gone(*_: object) -> None:
        raise OSError

    stop, silent = StopRequest(), StopRequest(silent=True)
    with monkeypatch.context() as patch, stop.listening():
        patch.setattr(os, "write", gone)
        signal.raise_signal(signal.SIGTERM)
    with silent.listening():
        signal.raise_signal(signal.SIGTERM)
    assert stop.requested and silent.requested and not capfd.readouterr().err
