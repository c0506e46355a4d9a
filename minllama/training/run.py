"""A run: its options, devices and progress, the state that a checkpoint holds, and when it ends.

What follows a step (evaluation, best model, checkpoint) is decided by its number alone, so a run
that is stopped anywhere and resumed ends as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from tqdm import tqdm

from config import Options
from llama import model_payload
from minllama.cli.console import say_command
from minllama.formats.pt_file import load_pt
from minllama.inference.copying import copying_seconds, most_looked_at
from minllama.machine.device import describe_device, dtype_name, is_out_of_memory
from minllama.machine.random_state import (
    random_state,
    rank_seed,
    restore_random_state,
    seed_everything,
)
from minllama.machine.ranks import LAUNCHER_GONE, Ranks, is_lost_peer
from minllama.machine.sharding import (
    full_state_dict,
    is_sharded,
    load_optimizer_state,
    load_state,
    local_shards,
)
from minllama.runs.checkpoints import Checkpoints, checked_number
from minllama.runs.metrics import finite_or_none, is_sound
from minllama.runs.plan import TrainingPlan
from minllama.runs.run_folder import RunFolder, files_written
from minllama.runs.telemetry import environment
from minllama.system.errors import TextLost, UsageError
from minllama.system.signals import StopRequest
from minllama.text.compression import compressing_seconds
from minllama.training.deadline import FINISHING, MAX_EPOCHS, WRITE_RATE, Deadline, Pace
from minllama.training.identity import command_to_train_on
from optimizer import make_optimizer

if TYPE_CHECKING:
    from minllama.training.task import Task

# What loading the state of another program, or of another model, raises.
LOAD_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass
class Progress:
    """Where a run is, in plain values; data order and learning rate follow from `step`."""

    step: int = 0  # optimizer steps completed
    tokens: int = 0  # trained on
    skipped: int = 0  # updates skipped in a row
    lr_scale: float = 1.0  # halved by each rollback
    split: int = 1  # parts in which a micro-batch is trained on, since it did not fit the memory
    first: float | None = None  # the goal before training
    first_old: float | None = None  # then, too: the loss of the text that the model was trained on
    old_text: str | None = None  # names the held-out part of that text
    best: float | None = None  # the goal's best value
    best_step: int = 0
    without_better: int = 0  # evaluations since then that could have chosen a new best
    held_out: str | None = None  # names the data that the best value was measured on
    pace: Pace = field(default_factory=Pace)  # of a run that keeps to a time
    spent: float = 0.0  # seconds of a run that keeps to a time
    pending: dict | None = None  # the last step's record, not yet evaluated and written

    def load(self, plain: dict[str, Any]) -> None:
        """Take over the values of a checkpoint. Raises ValueError for others than a run has."""
        plain = asdict(Progress()) | plain
        for name, kind in get_type_hints(Progress).items():
            value = plain[name]
            if kind is Pace and isinstance(value, dict):
                kinds = get_type_hints(Pace).items()
                value = Pace(*(checked_number(n, value.get(n), kind=k) for n, k in kinds))
            elif name == "pending" and value is not None:
                speed = value.get("tokens_per_second") if is_sound(value) else None
                checked_number("pending record's speed", speed, kind=float)
            elif kind in (int, float):
                checked_number(name, value, kind=kind, least=int(name == "split"))
            elif kind == float | None and value is not None:
                checked_number(name, value, kind=float)
            elif not isinstance(value, kind):
                raise ValueError(f"its {name} is {str(value)[:20]!r}")
            setattr(self, name, value)

    @property
    def recorded(self) -> int:
        """Steps whose records are complete."""
        return self.step - bool(self.pending)


class Run:
    """Everything that training works on. Every rank has one and calls its methods.

    `setup.open_run` makes it; task, plan and identity come when the data is known, and what
    trains (optimizer, checkpoints) with `start`.
    """

    task: Task
    plan: TrainingPlan
    identity: dict[str, Any]  # what a resumed run must share with its first one
    optimizer: Any
    checkpoints: Checkpoints

    def __init__(
        self,
        options: Options,
        folder: RunFolder,
        ranks: Ranks,
        stop: StopRequest,
        device: torch.device,
        dtype: torch.dtype,
        checkpoint: dict[str, Any] | None = None,
    ) -> None:
        """`options` are the checkpoint's where a flag was not typed; `dtype` is the compute dtype;
        `checkpoint` is what to resume from."""
        self.options, self.folder, self.ranks, self.stop = options, folder, ranks, stop
        self.device, self.dtype, self.checkpoint = device, dtype, checkpoint
        self.progress, self.run_id = Progress(), uuid.uuid4().hex
        self.deadline: Deadline | None = None
        self.stop_agreed: bool | None = None  # by all ranks in the last step: stop after it

    # ------------------------------------------------------------------------ beginning

    def start(self) -> None:
        """Build model and optimizer; load the checkpoint, or clear the folder; evaluate once.

        Every rank must call this.
        """
        self._build()
        checkpoint, self.checkpoint = self.checkpoint, None  # its file may be replaced now
        resumes = checkpoint is not None
        if resumes:
            self._resume(checkpoint)
        elif not self.ranks.is_main:
            self.seed_rank()  # rank 0 draws what a run alone would, the others dropout of their own
        del checkpoint  # its memory is not needed while the model is evaluated
        self.ranks.on_main(lambda: self._prepare_folder(resumes))
        if self.progress.first is None:
            self.progress.first = self.evaluate().get(self.task.goal)
        ended = resumes and not self.has_more()
        if ended:
            self._say_nothing_is_left()
        self.check_best()
        if ended and self.progress.best is None:
            self.note_best(self.evaluate())
            self.progress.best_step = self.progress.step  # also where the value is not finite
            self.save_best()  # these weights are the best there are

    def _build(self) -> None:
        options = self.options
        self.task.build()
        self.optimizer = make_optimizer(
            self.task.model,
            name=options.optimizer,
            lr=options.peak_lr(),
            weight_decay=options.decay(),
            dtype=self.dtype,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        sharded = is_sharded(self.task.model)
        self.checkpoints = Checkpoints(
            self.folder, self.ranks, sharded=sharded, keep_last=options.keep_last
        )
        if self.plan.is_timed:
            written = self.plan.checkpoint_bytes()
            written += 2 * self.plan.weights_file_bytes(options.save_dtype)
            finishing = FINISHING + written / WRITE_RATE
            finishing += copying_seconds(
                self.plan.config.parameters,
                min(self.plan.tokens, most_looked_at(options.minutes)),
            )
            finishing += compressing_seconds(self.task.val_set)
            self.deadline = Deadline(60 * options.minutes, options.started, finishing)

    def _resume(self, checkpoint: dict[str, Any]) -> None:
        self.ranks.on_all(functools.partial(self.restore, checkpoint))
        if self.deadline is not None:
            self.deadline.earlier_seconds = self.progress.spent
        self.ranks.on_main(lambda: self.folder.set_aside_later(self.run_id, self.progress.step))
        self.checkpoints.list_own(self.run_id)

    def _prepare_folder(self, resumes: bool) -> None:
        """Remove what an earlier run or a killed write left, and add this start to run.json."""
        if not resumes and self.options.overwrite:
            self.folder.clear()
        self.folder.remove_incomplete()
        start = {
            "options": self.options.to_plain(),
            "typed": sorted(self.options.given),
            "environment": environment(),
            "device": describe_device(self.device),
            "dtype": dtype_name(self.dtype),
            "processes": self.ranks.world_size,
            "machines": self.ranks.nodes,
            "launch": self.ranks.launch,
            "resumed_at_step": self.progress.step,
            "plan": self.plan.lines(None),
            "data": self.task.data,
            "files": files_written(self.options.to_plain()),
        }
        self.folder.add_start(start)

    def _say_nothing_is_left(self) -> None:
        """Of a resumed run that had ended: what would let it continue."""
        remedy, command = "a larger --epochs lets it continue", None
        if self.out_of_patience():
            remedy = "a larger --early_stopping lets it continue"
        elif self.plan.last_step < self.plan.schedule_steps:
            remedy = "a larger --max_steps lets it continue"
        elif self.deadline is not None:
            command = command_to_train_on(self.options, self.folder, self.ranks)
            remedy = "its minutes are over. This trains its model on:"
        elif self.options.schedule_steps is not None:
            remedy = "a larger --schedule_steps lets it continue"
        say_command(
            "nothing is left to train, and the last files are written again: the run ended after "
            f"step {self.progress.step:,}; {remedy}",
            command,
        )

    # ------------------------------------------------------------------------ its state

    def state(self) -> dict[str, Any]:
        """What a resumable checkpoint holds: everything that is not a flag or a data file.

        Of a sharded model it has this rank's shards, else rank 0 has the whole. Every rank must
        call this.
        """
        random_states = self.ranks.gather(random_state())
        model, optimizer = self.task.model, self.optimizer.state_dict()
        if is_sharded(model):
            weights, optimizer = local_shards(model.state_dict()), local_shards(optimizer)
        else:
            weights = full_state_dict(model, self.ranks)
        state = {
            **model_payload(self.task.llama, state=weights),
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "rng": random_states[0],
            "progress": asdict(self.progress),
            "identity": self.identity,
            "run_id": self.run_id,
            "options": self.options.to_plain(),
        }
        return state | ({"rng_of_ranks": random_states} if self.ranks.world_size > 1 else {})

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's state, whose identity has been checked; nothing of it is kept.

        Every rank must call this. Raises UsageError where it holds other things than a run's state.
        """
        try:
            load_state(self.task.model, state["model"])
            load_optimizer_state(self.optimizer, state["optimizer"])
            if state["scaler"]:  # else the run was not one in float16
                self.scaler.load_state_dict(state["scaler"])
            self.progress.load(state["progress"])
            random_states = state.get("rng_of_ranks", [state["rng"]])
            if len(random_states) == self.ranks.world_size:
                restore_random_state(random_states[self.ranks.rank])
            else:
                self.seed_rank()
        except LOAD_ERRORS as error:
            if is_lost_peer(error) or is_out_of_memory(error):
                raise
            reason = str(error).strip().split("\n")[0]
            raise UsageError(f"the checkpoint is not one of this program ({reason})") from None
        self.run_id = state.get("run_id", self.run_id)
        if self.ranks.world_size > 1:
            self.progress.split = 1  # several processes train on micro-batches as given

    def seed_rank(self) -> None:
        """Seed this rank's dropout, where no checkpoint has a random state for so many ranks."""
        seed_everything(rank_seed(self.options.seed, self.progress.step, self.ranks.rank))

    # ------------------------------------------------------------------------ its best model

    def evaluate(self, *, sample: bool = False) -> dict[str, Any]:
        """The task's metrics, and if asked and there is one, a sample of what the model writes.

        Every rank must call this; raises Interrupted when asked to stop.
        """
        started = time.monotonic()
        metrics = {name: finite_or_none(value) for name, value in self.task.evaluate().items()}
        if sample and (text := self.task.sample()) is not None:
            metrics["sample"] = text
        if self.deadline is not None:
            self.deadline.note_evaluation(time.monotonic() - started)
        return metrics

    def note_best(self, record: dict[str, Any]) -> bool:
        """Note the record's value of the goal if it is the best so far; returns whether it is."""
        value, best = record.get(self.task.goal), self.progress.best
        self.progress.without_better += 1
        if value is None or not math.isfinite(value):
            return False
        if best is not None and (value <= best if self.task.higher_is_better else value >= best):
            return False
        self.progress.best, self.progress.best_step = value, self.progress.step
        self.progress.without_better = 0
        return True

    def save(self, path: Path | None = None) -> None:
        """Write a resumable checkpoint, by default one of this step. Every rank must call this."""
        self.checkpoints.join()  # the copy in memory of the one before goes first
        self.checkpoints.save(self.state(), path)

    def save_best(self) -> None:
        """Write best-model.pt, with the step that it is of. Every rank must call this."""
        weights = self.task.weights() | {"step": self.progress.best_step}
        self.checkpoints.save_weights("best-model.pt", weights)

    def check_best(self) -> None:
        """Forget the best value where it is of other data, of steps that were given up, or lost."""

        def is_there() -> bool:
            with contextlib.suppress(UsageError):
                best = load_pt(self.folder.file("best-model.pt"), verify=False)
                step = best.get("step")
                return isinstance(step, int) and step <= self.progress.step
            return False

        progress, held_out = self.progress, self.task.held_out or "none"
        if progress.best is not None:
            if progress.held_out not in (None, held_out):  # None: an earlier version's checkpoint
                tqdm.write("the held-out data is not that of the run so far: a new best is chosen")
                progress.best, progress.without_better = None, 0
            elif not self.ranks.on_main(is_there):
                tqdm.write("best-model.pt is missing, or of other steps: a new best is chosen")
                progress.best = None
        progress.held_out = held_out

    # ------------------------------------------------------------------------ where it ends

    @property
    def last_step(self) -> int:
        """The step to end after: the plan's, or what the time allows."""
        end = self.progress.pace.end or self.plan.last_step
        return min(end, self.options.max_steps or end)

    def has_more(self) -> bool:
        """Whether there is a step to make, or the last one's record still to complete."""
        if self.progress.pending:
            return True
        return self.progress.step < self.last_step and not self.out_of_patience()

    def out_of_patience(self) -> bool:
        """Whether too many looks for a new best in a row have found none."""
        patience = self.options.early_stopping
        return patience is not None and self.progress.without_better >= patience

    def adjust_last_step(self) -> None:
        """After a step of --minutes: set the last one by the time that is left.

        Every rank must call this; rank 0's clock decides.
        """
        deadline, progress, plan = self.deadline, self.progress, self.plan
        if deadline is None:
            return
        progress.spent = deadline.spent()
        step, planned = progress.step, progress.pace.end or plan.schedule_steps
        if not deadline.is_check_due(step, planned):
            return
        interval = self.task.eval_interval
        end = self.ranks.on_main(lambda: deadline.last_step(step, planned, interval))
        end = min(end, max(plan.schedule_steps, MAX_EPOCHS * plan.steps_per_epoch))
        if end != planned:
            position = progress.pace.schedule_position(step, plan.schedule_steps)
            progress.pace = Pace(step, position, end)
        deadline.note_end(step, planned, end)

    def stop_signal(self, *, now: bool = False) -> int:
        """The signal that asks this rank to stop, 0: none; `now` looks at the folder in any case.

        If the folder or the launcher is gone, `stop.failure` says which.
        """
        failure = self.folder.missing_folder_error(now=now)
        if self.ranks.launcher_is_gone():
            failure = LAUNCHER_GONE
        if failure and not self.stop.requested:
            self.stop.fail(failure)
        return self.stop.signal_number or 0

    def agree_to_stop(self, numbers: Iterable[float]) -> None:
        """Take over what all ranks' `stop_signal` was in a step: whether to stop after it."""
        number = int(max(numbers))
        if number and not self.stop.requested:
            self.stop.signal_number = number
        self.stop_agreed = bool(number)

    def should_stop(self, *, at_end: bool = False) -> bool:
        """Whether a rank was asked to stop, or what the run stands on is gone.

        After a step several ranks go by what they agreed on in it; `at_end` they agree again, and
        look at the folder now. Every rank must call this.
        """
        agreed, self.stop_agreed = self.stop_agreed, None
        if agreed is not None and self.ranks.world_size > 1 and not at_end:
            return agreed
        self.stop_signal(now=at_end)
        return self.ranks.agree_to_stop(self.stop)

    def stop_for(self, lost: TextLost) -> None:
        """Stop, with what is trained saved; with several ranks raise: the others already wait."""
        if self.ranks.world_size > 1:
            raise lost
        self.stop.fail(str(lost))
