"""Keeping a run to its --minutes: how many steps the time allows, decided again while it trains.

The learning rate belongs to a position on the schedule, and a run that has to end at a time moves
along the schedule as fast as its speed demands: on a machine that turned slow as on a quiet one the
schedule is at its end when the time is.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from tqdm import tqdm

from minllama.cli.chinese import translate

FINISHING = 1.5  # seconds from the last step's evaluation to the end, beside writing files
WRITE_RATE = 150e6  # bytes a second that files are written with
MAX_EPOCHS = 20  # whatever the time: from then on a text is overfitted
MAX_CHECKS = 20  # of the clock in the steps that are left: each may move the end
NOTABLE, NOTABLE_AGAIN = 1.25, 2.0  # an end that moves by this factor is printed, and then again


@dataclass
class Pace:
    """How step numbers map to the schedule, in plain values that a checkpoint keeps.

    At step `step` the run was at position `place` of the schedule, and from there it goes evenly to
    the schedule's end at step `end`.
    """

    step: int = 0
    place: float = 0.0  # in steps of the schedule as it was planned
    end: int = 0  # 0: as planned

    def schedule_position(self, step: int, schedule_steps: int) -> float:
        """The position on a schedule of `schedule_steps` at a step of the run."""
        if not self.end:
            return float(step)
        share = (step - self.step) / max(1, self.end - self.step)
        return self.place + share * (schedule_steps - self.place)


@dataclass
class Deadline:
    """The time of a run of --minutes, from its command to its last file, over all its starts."""

    seconds: float
    started: float  # time.monotonic() when this command began
    finishing_seconds: float = FINISHING
    earlier_seconds: float = 0.0  # that earlier starts took
    last_evaluation: float = 0.0  # seconds
    evaluating: float = 0.0  # seconds since the last check
    checked: tuple[int, float] | None = None  # step and time of the last check
    seconds_per_step: float | None = None  # smoothed
    next_check: int = 1  # after this step
    announced: int | None = None  # the last step that was printed as the end
    notable: float = NOTABLE

    def spent(self) -> float:
        """Seconds of the run so far."""
        return self.earlier_seconds + time.monotonic() - self.started

    def seconds_left(self) -> float:
        """Seconds to the end of the command."""
        return self.seconds - self.spent()

    def note_evaluation(self, seconds: float) -> None:
        """Take note of how long an evaluation took."""
        self.last_evaluation, self.evaluating = seconds, self.evaluating + seconds

    def is_check_due(self, step: int, end: int) -> bool:
        """Whether to check the clock after this step; every rank comes to the same."""
        return self.next_check <= step < end

    def last_step(self, step: int, planned: int, eval_interval: int) -> int:
        """The step to end after, by the speed since the last check; `planned` at the first one.

        Leaves time for the evaluations to come and for the files of the end.
        """
        now = time.monotonic()
        checked, self.checked = self.checked, (step, now)
        evaluating, self.evaluating = self.evaluating, 0.0
        if checked is None or step <= checked[0]:
            return planned
        seconds = max(1e-9, now - checked[1] - evaluating) / (step - checked[0])
        before = self.seconds_per_step
        self.seconds_per_step = seconds if before is None else (before + seconds) / 2
        left = self.seconds_left() - self.finishing_seconds - self.last_evaluation
        per_step = self.seconds_per_step
        per_step += self.last_evaluation / eval_interval if eval_interval else 0.0
        return step + max(1, round(left / per_step))

    def note_end(self, step: int, planned: int, end: int) -> None:
        """Take note that the run ends after `end` and not `planned` steps; says a large change.

        On a busy machine the speed goes up and down: what was said once is said again only where
        it has become quite another.
        """
        self.next_check = next_check(step, end)
        before = self.announced = self.announced or planned
        if not 1 / self.notable < end / before < self.notable:
            self.announced, self.notable = end, NOTABLE_AGAIN
            line = (
                f"the speed has changed: {end:,} steps instead of {before:,} end on time, and the "
                "learning rate's schedule with them"
            )
            tqdm.write(translate(line, sys.stdout))


def next_check(step: int, end: int) -> int:
    """The step after which to check the clock again; every rank comes to the same."""
    return step + max(1, (end - step) // MAX_CHECKS)
