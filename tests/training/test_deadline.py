"""Runs that keep to a time: on a clock that the test turns."""

from __future__ import annotations

import math
import shlex
import time
from pathlib import Path

import pytest
from running import assert_same, command, pretrain, records, steps, stop_after, write_stories

from minllama.runs.checkpoints import load_checkpoint
from minllama.training import deadline, loop
from minllama.training.deadline import Deadline, Pace, next_check
from optimizer import learning_rate

pytestmark = pytest.mark.usefixtures("empty_folder")
TIMED = "--minutes 1 --val_fraction 0.2"
CHOSEN = {"schedule_steps": 40, "lr_scheduler": "linear", "eval_interval": 8}


class Clock:
    """A clock that optimizer steps and evaluations move on by as much as the test says."""

    def __init__(self, patch: pytest.MonkeyPatch, a_step, an_evaluation: float = 0.5) -> None:
        self.started = self.now = time.monotonic()
        patch.setattr(deadline.time, "monotonic", lambda: self.now)
        real_step, real_evaluate = loop.optimizer_step, loop.Run.evaluate

        def optimizer_step(run, batches):
            self.now += a_step(run.progress.step)
            return real_step(run, batches)

        def evaluate(run, **settings):
            found = real_evaluate(run, **settings)
            self.now += an_evaluation
            run.deadline.note_evaluation(an_evaluation)
            return found

        self.spent = lambda: self.now - self.started
        patch.setattr(loop, "optimizer_step", optimizer_step)
        patch.setattr(loop.Run, "evaluate", evaluate)


@pytest.fixture
def timed(monkeypatch):
    """Runs a small pretraining of 60 seconds on a clock; returns the clock."""
    write_stories(Path.cwd(), 12)
    monkeypatch.setattr(
        "minllama.training.pretraining.fit_to_time",
        lambda options, *_, **__: options.choose(CHOSEN),
    )

    def run(a_step, line: str = "", **settings):
        with monkeypatch.context() as patch:
            clock = Clock(patch, a_step)
            done = pretrain(f"{TIMED} {line}", **settings)
            return clock, done

    return run


def test_steps_follow_from_the_time():
    """What is left, less evaluations and the end, at the speed since the last look."""
    clock = Deadline(seconds=100, started=0.0, finishing_seconds=2)
    patch = pytest.MonkeyPatch()
    with patch.context() as at:
        at.setattr(deadline.time, "monotonic", lambda: 10.0)
        clock.note_evaluation(1.0)
        assert clock.last_step(5, 50, 10) == 50  # nothing is known of the speed yet
        at.setattr(deadline.time, "monotonic", lambda: 20.0)
        # Half a second a step, and one evaluation in ten steps: (100 - 20 - 2 - 1) / 0.6.
        assert clock.last_step(25, 50, 10) == 25 + round(77 / 0.6)


def test_a_new_end_keeps_the_place_on_the_way():
    """The learning rate goes on from where it was, and is at its end when the run is."""
    settings = {"peak_lr": 1.0, "min_lr": 0.0, "warmup_steps": 0, "total_steps": 100}
    pace = Pace()
    before = learning_rate(pace.schedule_position(30, 100), **settings, scheduler="linear")
    pace = Pace(30, pace.schedule_position(30, 100), 44)  # slower: 14 steps instead of 70
    after = learning_rate(pace.schedule_position(30, 100), **settings, scheduler="linear")
    assert after == before == 0.7
    halfway = learning_rate(pace.schedule_position(37, 100), **settings, scheduler="linear")
    assert halfway == pytest.approx(0.35)
    assert learning_rate(pace.schedule_position(44, 100), **settings, scheduler="linear") == 0.0


def test_looks_at_the_clock_become_denser():
    """Every step towards the end: a late surprise moves it by little."""
    assert (next_check(0, 1000), next_check(990, 1000), next_check(999, 1000)) == (50, 991, 1000)


@pytest.mark.parametrize(
    "a_step, told", [(lambda step: 1.2, ""), (lambda step: 0.3, "the speed has changed")]
)
def test_the_run_ends_on_time(timed, a_step, told):
    """Twice as fast or as slow as was thought, with the schedule at its end."""
    clock, done = timed(a_step)
    assert done.status == 0 and 54 < clock.spent() <= 60
    last = records()[-1]
    assert last["lr"] < 0.1 * max(record["lr"] for record in records())
    assert last["val_loss"] is not None
    assert (told in done.error + done.out) if told else True


def test_a_speed_that_goes_up_and_down_is_told_once(capsys):
    """On a busy machine it was told again and again; by now where it is quite another."""
    clock = Deadline(seconds=100, started=0.0)
    for end in (110, 140, 100, 150, 90, 141):
        clock.note_end(10, 100, end)
    assert capsys.readouterr().out.count("140 steps instead of 100") == 1
    clock.note_end(20, 141, 60)
    assert capsys.readouterr().out.startswith("the speed has changed: 60 steps instead of 140")


def test_a_machine_that_turns_slow_is_told(timed):
    """And the schedule still comes to its end, in fewer steps."""
    clock, done = timed(lambda step: 1.0 if step < 15 else 4.0)
    assert done.status == 0 and clock.spent() <= 63
    assert "the speed has changed" in done.error + done.out
    assert records()[-1]["lr"] < 0.3 * max(record["lr"] for record in records())


def test_a_rollback_does_not_count_its_time_twice(timed, monkeypatch):
    """The seconds up to the checkpoint were added to those since the command began.

    So the run ended early, and said that the machine was slow.
    """
    real = loop.backward

    def backward(run, *rest):
        bad = 10 <= run.progress.step < 20 and run.progress.lr_scale == 1
        return real(run, *rest) * (math.nan if bad else 1)

    monkeypatch.setattr(loop, "backward", backward)
    clock, done = timed(lambda step: 1.0, "--checkpoint_interval 5")
    assert done.status == 0 and "back to step 10" in done.error + done.out
    assert 54 < clock.spent() <= 60


def test_a_run_whose_time_is_over_says_how_to_train_on(timed):
    """Resumed the next day it was done at once, and only hinted at what to type."""
    assert timed(lambda step: 1.2)[1].status == 0
    _, done = timed(lambda step: 1.2, "--resume auto")
    assert done.status == 0 and "its minutes are over. This trains its model on:" in done.out
    printed = shlex.split(done.out.partition("trains its model on:\n")[2].splitlines()[0])
    model = printed[printed.index("--pretrained_model_path") + 1]
    assert Path(model) == Path("run/final-model.pt") and "run-2" in printed
    assert printed[printed.index("--minutes") + 1] == "1"
    words = [word for word in printed[2:] if word not in ("--minutes", "1")]
    assert command([*words, "--max_steps", "1"]).status == 0
    assert Path("run-2/final-model.pt").is_file()


def test_interrupted_and_resumed_it_goes_the_same_way(timed, monkeypatch):
    """Of one pace, decided before the interruption, the same weights bit for bit."""
    monkeypatch.setattr(
        "minllama.training.deadline.next_check", lambda step, end: 10 if step < 10 else 10**9
    )
    assert timed(lambda step: 1.2)[1].status == 0
    end = steps()[-1]
    with monkeypatch.context() as patch:
        _, done = timed(lambda step: 1.2, "--save_dir half", stop=stop_after(20, patch))
    assert done.status == 130
    assert load_checkpoint(Path("half/pretrain-step-20.pt"))["progress"]["spent"] > 20
    assert timed(lambda step: 1.2, "--save_dir half --resume auto")[1].status == 0
    assert steps("half/metrics.jsonl")[-1] == end
    whole, halves = (load_checkpoint(Path(f"{f}/pretrain-step-{end}.pt")) for f in ("run", "half"))
    for state in (whole, halves):
        del state["progress"]["spent"]  # seconds, of which no two runs take the same
    for part in ("model", "optimizer", "rng", "progress"):
        assert_same(whole[part], halves[part], part)
