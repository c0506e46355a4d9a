"""Keeping a run to its --minutes: how many steps the time allows, decided anew while it trains.

The schedule is a way from its first step to its last. A run that has to end at a time goes along
it at a pace that follows from its speed: the learning rate belongs to the place on the way, so it
is at its end when the time is, on a machine that turned slow as on a quiet one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

FINISHING = 1.5  # seconds from the last step's evaluation to the end, beside writing files
WRITTEN = 150e6  # bytes a second that files are written with
MOST_EPOCHS = 20  # whatever the time: from then on a text is learnt by heart
LOOKS = 20  # at the clock in the steps that are left, at most: each may move the end
TOLD = 1.25  # a number of steps that differs by this factor from what was said is said


@dataclass
class Pace:
    """Where a run is on the way of its schedule, in plain values that a checkpoint keeps.

    At step `step` it was at `place`, and from there it goes evenly to the end at step `end`.
    """

    step: int = 0
    place: float = 0.0  # steps of the schedule as it was planned
    end: int = 0  # 0: as planned

    def at(self, step: int, schedule_steps: int) -> float:
        """The place on a way of `schedule_steps` at a step of the run."""
        if not self.end:
            return float(step)
        share = (step - self.step) / max(1, self.end - self.step)
        return self.place + share * (schedule_steps - self.place)


@dataclass
class Deadline:
    """The time of a run of --minutes, from its command to its last file, over all its starts."""

    seconds: float
    started: float  # time.monotonic() when this command began
    finishing: float = FINISHING
    before: float = 0.0  # seconds that earlier starts took
    evaluation: float = 0.0  # seconds of the last one
    evaluated: float = 0.0  # seconds of all since the last look at the clock
    looked: tuple[int, float] | None = None  # step and time of the last look
    pace: float | None = None  # seconds a step, smoothed

    def spent(self) -> float:
        """Seconds of the run so far."""
        return self.before + time.monotonic() - self.started

    def note_evaluation(self, seconds: float) -> None:
        """Take note of how long an evaluation took."""
        self.evaluation, self.evaluated = seconds, self.evaluated + seconds

    def last_step(self, step: int, planned: int, eval_interval: int) -> int:
        """The step to end after, by the speed since the last look; `planned` at the first look.

        Leaves time for the evaluations to come and for the files of the end.
        """
        now = time.monotonic()
        looked, self.looked = self.looked, (step, now)
        evaluated, self.evaluated = self.evaluated, 0.0
        if looked is None or step <= looked[0]:
            return planned
        pace = max(1e-9, now - looked[1] - evaluated) / (step - looked[0])
        self.pace = pace if self.pace is None else (self.pace + pace) / 2
        left = self.seconds - self.spent() - self.finishing - self.evaluation
        a_step = self.pace + (self.evaluation / eval_interval if eval_interval else 0.0)
        return step + max(1, round(left / a_step))


def next_look(step: int, end: int) -> int:
    """The step after which to look at the clock again; all ranks come to the same."""
    return step + max(1, (end - step) // LOOKS)
