"""The train loop that pretraining and finetuning share: a task's batches and loss, made into steps.

What follows a step (evaluation, best model, checkpoint) is decided by its number alone, so a run
that is stopped anywhere and resumed ends as if it had never stopped. Several ranks go through this
side by side: what is decided here is the same on each, and `ranks` is where they meet.
"""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from dataclasses import asdict, dataclass, field
from typing import Any, get_type_hints

import torch
from torch import nn
from torch.profiler import record_function
from tqdm import tqdm

from llama import model_payload
from minllama.console import show_record, training_bar
from minllama.deadline import FINISHING, MOST_EPOCHS, TOLD, WRITTEN, Deadline, Pace, next_look
from minllama.device import (
    autocast,
    describe_device,
    dtype_name,
    is_out_of_memory,
    peak_flops,
    used_memory,
)
from minllama.errors import Interrupted, RunFailed, TextLost, UsageError
from minllama.pt_file import load_pt
from minllama.random_state import random_state, rank_seed, restore_random_state, seed_everything
from minllama.ranks import LAUNCHER_GONE, is_lost_peer
from minllama.record import (
    PHASES,
    SPIKE_WINDOW,
    environment,
    finite_or_none,
    gpu_telemetry,
    note_spike,
    profiled,
)
from minllama.recording import NoRecording, Recording
from minllama.run_folder import read_on_ranks
from minllama.saving import Checkpoints
from minllama.session import Session
from minllama.sharding import (
    full_state_dict,
    is_dtensor,
    is_sharded,
    load_optimizer_state,
    load_state,
    local_shards,
    no_gradient_sync,
)
from minllama.task import Batch, Task
from optimizer import learning_rate, make_optimizer

MAX_SKIPPED = 10  # updates in a row that may be skipped for numbers that are not finite
MAX_ROLLBACKS = 4  # each halves the learning rate
SHOWN_PLACES = 4  # of the sequences of a skipped step
# What loading another program's state raises.
STRANGE_STATE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

# ---------------------------------------------------------------------------- a run


@dataclass
class Progress:
    """Where a run is, in plain values; data order and learning rate follow from `step`."""

    step: int = 0  # optimizer steps made
    tokens: int = 0  # trained on
    skipped: int = 0  # updates skipped in a row
    lr_scale: float = 1.0  # halved by each rollback
    split: int = 1  # parts in which a micro-batch is trained on, since it did not fit the memory
    first: float | None = None  # the goal before training
    best: float | None = None  # the goal's best value
    best_step: int = 0
    without_better: int = 0  # looks for a new best since then
    pace: Pace = field(default_factory=Pace)  # of a run that keeps to a time
    spent: float = 0.0  # seconds of a run that keeps to a time
    pending: dict | None = None  # the last step's record, not yet evaluated and written

    def load(self, plain: dict[str, Any]) -> None:
        """Take over the values of a checkpoint. Raises ValueError for other names or types."""
        for name, kind in get_type_hints(Progress).items():
            value = plain.get(name, getattr(Progress(), name))
            if kind is Pace and isinstance(value, dict):
                value = Pace(int(value["step"]), float(value["place"]), int(value["end"]))
            if not isinstance(value, kind):
                raise ValueError(f"its {name} is {str(value)[:20]!r}")
            setattr(self, name, value)


class Run:
    """Everything the train loop works on."""

    def __init__(self, session: Session, task: Task) -> None:
        self.session, self.task, self.plan = session, task, session.plan
        self.options, self.folder = session.options, session.folder
        self.ranks, self.stop = session.ranks, session.stop
        self.device, self.dtype = session.device, session.dtype
        self.optimizer = make_optimizer(
            task.model,
            name=self.options.optimizer,
            lr=self.options.peak_lr(),
            weight_decay=self.options.decay(),
            dtype=self.dtype,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.progress, self.run_id = Progress(), uuid.uuid4().hex
        self.deadline = self._deadline()
        self.looks_at = 1  # at the clock, after this step
        self.said_steps: int | None = None  # as the end of a run that keeps to a time
        self.checkpoints = Checkpoints(
            self.folder,
            self.ranks,
            make_state=self.state,
            sharded=is_sharded(task.model),
            keep_last=self.options.keep_last,
        )

    def state(self) -> dict[str, Any]:
        """What a resumable checkpoint holds: everything that is not a flag or a data file.

        Of a sharded model it has this rank's shards, else rank 0 has the whole.
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
            "identity": self.session.identity,
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
        except STRANGE_STATE as error:
            if is_lost_peer(error) or is_out_of_memory(error):
                raise
            reason = str(error).strip().split("\n")[0]
            raise UsageError(f"the checkpoint is not one of this program ({reason})") from None
        self.run_id = state.get("run_id", self.run_id)
        if self.deadline is not None:
            self.deadline.before = self.progress.spent
        if self.ranks.world_size > 1:
            self.progress.split = 1  # several processes train on micro-batches as given

    def seed_rank(self) -> None:
        """Give this rank dropout of its own, where no checkpoint has it for this many ranks."""
        seed_everything(rank_seed(self.options.seed, self.progress.step, self.ranks.rank))

    def start(self) -> None:
        """Take over the session's checkpoint or clear the folder, and record what will run."""
        ranks, checkpoint = self.ranks, self.session.checkpoint
        self.session.checkpoint = None  # its memory can be freed, and its file replaced
        if checkpoint is not None:
            ranks.on_all(lambda: self.restore(checkpoint))
            ranks.on_main(lambda: self.folder.set_aside_later(self.run_id, self.progress.step))
        elif not ranks.is_main:
            self.seed_rank()

        def begin() -> None:
            if checkpoint is None and self.options.overwrite:
                self.folder.clear()
            self.folder.remove_incomplete()
            start = {
                "options": self.options.to_plain(),
                "environment": environment(),
                "device": describe_device(self.device),
                "dtype": dtype_name(self.dtype),
                "processes": ranks.world_size,
                "launch": ranks.launch,
                "resumed_at_step": self.progress.step,
                "plan": self.plan.lines(None),
            }
            self.folder.add_start(start)

        ranks.on_main(begin)
        if self.progress.first is None:
            self.progress.first = self.evaluate().get(self.task.goal)
        if checkpoint is not None and not self.has_more():
            self._say_nothing_is_left()
        self.check_best()
        if checkpoint is not None and self.progress.best is None and not self.has_more():
            self.note_best(self.evaluate())  # these weights are the best there are
            self.progress.best_step = self.progress.step
            self.save_best()

    def check_best(self) -> None:
        """Forget the best value where best-model.pt is lost, or of steps that were given up."""

        def is_there() -> bool:
            with contextlib.suppress(UsageError):
                best = load_pt(self.folder.file("best-model.pt"), verify=False)
                step = best.get("step")
                return isinstance(step, int) and step <= self.progress.step
            return False

        if self.progress.best is not None and not self.ranks.on_main(is_there):
            self.progress.best = None
            tqdm.write("best-model.pt is missing, or of other steps: a new best model is chosen")

    def save_best(self) -> None:
        """Write best-model.pt, with the step that it is of."""
        weights = self.task.weights() | {"step": self.progress.best_step}
        self.checkpoints.save_weights("best-model.pt", weights)

    def _say_nothing_is_left(self) -> None:
        """Of a resumed run that had ended: what would let it continue."""
        flag = "--epochs"
        if self.out_of_patience():
            flag = "--early_stopping"
        elif self.plan.last_step < self.plan.schedule_steps:
            flag = "--max_steps"
        elif self.deadline is not None:
            flag = "--minutes"
        print(
            f"nothing is left to train: the run ended after step {self.progress.step:,}; a larger "
            f"{flag} lets it continue. Its last files are written again"
        )

    # ------------------------------------------------------------------------ where it ends

    def is_to_stop(self, *, at_end: bool = False) -> bool:
        """Whether a rank was asked to stop, or what the run stands on is gone. All ranks call it.

        Then `stop.failure` says what is, on the ranks that noticed.
        """
        failure = self.folder.find_loss(now=at_end)
        if self.ranks.launcher_is_gone():
            failure = LAUNCHER_GONE
        if failure and not self.stop.requested:
            self.stop.fail(failure)
        return self.ranks.agree_to_stop(self.stop)

    def stop_for(self, lost: TextLost) -> None:
        """Stop, with what is trained saved; with several ranks raise, for the others wait."""
        if self.ranks.world_size > 1:
            raise lost
        self.stop.fail(str(lost))

    def has_more(self) -> bool:
        """Whether there is a step to make, or the last one's record still to complete."""
        if self.progress.pending:
            return True
        return self.progress.step < self.last_step and not self.out_of_patience()

    @property
    def last_step(self) -> int:
        """The step to end after: the plan's, or what the time allows."""
        end = self.progress.pace.end or self.plan.last_step
        return min(end, self.options.max_steps or end)

    def _deadline(self) -> Deadline | None:
        options = self.options
        if options.option != "pretrain" or options.minutes is None:
            return None
        plan = self.plan
        written = plan.checkpoint_bytes() + 2 * plan.weights_file_bytes(options.save_dtype)
        finishing = FINISHING + written / WRITTEN
        return Deadline(60 * options.minutes, options.started, finishing)

    def evaluate(self, *, sample: bool = False) -> dict[str, Any]:
        """The task's metrics, and if asked and there is one, a sample of what the model writes.

        Every rank must call this; raises Interrupted when asked to stop.
        """
        started = time.monotonic()
        found = {name: finite_or_none(value) for name, value in self.task.evaluate().items()}
        if sample and (text := self.task.sample()) is not None:
            found["sample"] = text
        if self.deadline is not None:
            self.deadline.note_evaluation(time.monotonic() - started)
        return found

    def keep_time(self) -> None:
        """After a step: set the last one by the time that is left. Every rank must call this."""
        deadline, progress, way = self.deadline, self.progress, self.plan.schedule_steps
        if deadline is None:
            return
        progress.spent = deadline.spent()
        step, end = progress.step, progress.pace.end or way
        if step < self.looks_at or step >= end:
            return
        found = self.ranks.on_main(lambda: deadline.last_step(step, end, self.task.eval_interval))
        found = min(found, max(way, MOST_EPOCHS * self.plan.steps_per_epoch))
        self.looks_at = next_look(step, found)
        if found != end:
            progress.pace = Pace(step, progress.pace.at(step, way), found)
        was = self.said_steps = self.said_steps or end
        if not 1 / TOLD < found / was < TOLD:
            self.said_steps = found
            slower = "slower" if found < was else "faster"
            tqdm.write(
                f"the machine is {slower} than it was: {found:,} steps instead of {was:,} end on "
                "time, and the learning rate's schedule with them"
            )

    def out_of_patience(self) -> bool:
        """Whether too many looks for a new best in a row have found none."""
        patience = self.options.early_stopping
        return patience is not None and self.progress.without_better >= patience

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


# ---------------------------------------------------------------------------- the loop


def train(run: Run) -> bool:
    """Train from where the run is to the plan's last step, or until asked to stop.

    Returns whether it was asked to stop. Each step makes one record of the metrics.
    """
    plan, task, options, progress = run.plan, run.task, run.options, run.progress
    ranks, stop, checkpoints = run.ranks, run.stop, run.checkpoints
    sample_gpu = gpu_telemetry(run.device)
    peak = ranks.world_size * peak_flops(run.device, run.dtype)
    flops = plan.flops_per_token()
    done = progress.step - bool(progress.pending)  # steps whose record is complete
    recording: Recording | NoRecording = NoRecording()
    if ranks.is_main:
        recording = Recording(
            run.folder,
            done,
            last_step=lambda: run.last_step,
            window=SPIKE_WINDOW,
            tensorboard=options.tensorboard,
            save=checkpoints.save_file,
        )
    bar = training_bar(progress.step, run.last_step)
    profile = profiled(
        run.folder.file("profile.json.gz"),
        enabled=options.profile and ranks.is_main,
        device=run.device,
        save=checkpoints.save_file,
    )
    checkpoints.next_step(progress.step)
    task.model.train()
    task.warm_up_gradient_sync(progress.step)
    with checkpoints, recording, bar, profile as step_made:
        while run.has_more() and not run.is_to_stop():
            try:
                record = progress.pending or optimizer_step(run)
            except TextLost as lost:
                run.stop_for(lost)
                continue
            step_made()
            if progress.skipped >= MAX_SKIPPED:
                roll_back(run)
                recording.rewind(progress.step - bool(progress.pending))
                bar.n = progress.step
                continue
            progress.pending = record
            run.keep_time()
            bar.total = run.last_step
            epoch, steps_into_epoch = divmod(progress.step, plan.steps_per_epoch)
            ends_epoch, ends_run = steps_into_epoch == 0, progress.step == run.last_step
            choose_best = ends_run or every(task.eval_interval, progress.step)
            evaluates = ends_epoch and task.best_interval > 0
            choose_best |= evaluates and epoch % task.best_interval == 0
            if evaluates or choose_best:
                try:
                    record |= run.evaluate(sample=True)
                except Interrupted:
                    break  # the checkpoint keeps the record, so the resumed run evaluates it
                except TextLost as lost:
                    run.stop_for(lost)
                    break
            progress.pending = None
            record["mfu"] = record["tokens_per_second"] * flops / peak
            note_spike(record, recording.records)
            recording.append(record | sample_gpu())
            show_record(bar, record)
            checkpoints.next_step(progress.step)
            if choose_best and run.note_best(record):
                run.save_best()
            ends_run |= run.out_of_patience()
            is_kept = ends_epoch and (ends_run or epoch % options.save_interval == 0)
            if is_kept or ends_run or every(options.checkpoint_interval, progress.step):
                recording.sync()
                checkpoints.save(run.folder.epoch_checkpoint(epoch) if is_kept else None)
        stopped = run.is_to_stop(at_end=True)
        if stopped:
            recording.state = "stopped"
            recording.sync()
            checkpoints.save()
            checkpoints.finish()
        if stop.failure:
            raise RunFailed(
                f"{stop.failure}: stopped after step {progress.step:,}, and saved; the same "
                "command with --resume auto continues"
            )
    if not stopped and run.out_of_patience():
        print(f"stopped: no better {task.goal} in {options.early_stopping} evaluations in a row")
    return stopped


def optimizer_step(run: Run) -> dict[str, Any]:
    """Train on one accumulation window; returns the step's record.

    The gradient is that of the mean loss over all targets of the window, on all ranks, so
    accumulation, ragged batches and any number of ranks equal one big batch.
    """
    started = time.perf_counter()
    progress, ranks = run.progress, run.ranks
    lr = progress.lr_scale * learning_rate(
        progress.pace.at(progress.step, run.plan.schedule_steps),
        peak_lr=run.options.peak_lr(),
        min_lr=run.options.min_lr,
        warmup_steps=run.plan.warmup_steps,
        total_steps=run.plan.schedule_steps,
        scheduler=run.options.lr_scheduler,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    with record_function(PHASES[0]):
        batches = run.task.batches(progress.step)
    targets, tokens = ranks.sum(sum(b.targets for b in batches), sum(b.tokens for b in batches))
    targets = max(1, targets)  # none at all: a loss of 0, not NaN
    with record_function(PHASES[1]):
        loss_sum = backward_in_parts(run, batches, targets)
    with record_function(PHASES[2]):
        run.scaler.unscale_(run.optimizer)
        parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
        grad_norm = nn.utils.clip_grad_norm_(parameters, run.options.grad_clip or math.inf)
        grad_norm = (grad_norm.full_tensor() if is_dtensor(grad_norm) else grad_norm).item()
        loss_sum, memory = ranks.sum(loss_sum, used_memory(run.device) or 0)
        loss = loss_sum / targets
        update(run, batches, loss, grad_norm)
    progress.step += 1
    progress.tokens += int(tokens)
    return {
        "step": progress.step,
        "epoch": (progress.step - 1) // run.plan.steps_per_epoch + 1,
        "tokens": progress.tokens,
        "loss": finite_or_none(loss),
        "val_loss": None,
        "lr": lr,
        "grad_norm": finite_or_none(grad_norm),
        "tokens_per_second": tokens / (time.perf_counter() - started),
        "memory": int(memory) or None,
    }


def backward(run: Run, batches: list[Batch], targets: float) -> float:
    """Sum up the gradients of the window's mean loss; returns the sum of this rank's losses."""
    loss_sum = torch.zeros((), device=run.device)
    share = targets / run.ranks.world_size  # since DDP and FSDP average over the ranks
    run.task.split = run.progress.split
    parts = [inputs for batch in batches for inputs in batch.parts(run.task.split)]
    for number, inputs in enumerate(parts, start=1):
        last = number == len(parts)  # then the ranks reduce what they accumulated
        with contextlib.nullcontext() if last else no_gradient_sync(run.task.parallel):
            with autocast(run.device, run.dtype):
                batch_loss = run.task.loss(*inputs)
            run.scaler.scale(batch_loss / share).backward()
        loss_sum += batch_loss.detach()
    return loss_sum.item()


def backward_in_parts(run: Run, batches: list[Batch], targets: float) -> float:
    """`backward`, with micro-batches halved as often as it takes to fit the memory.

    The window's sequences, their order and the update stay the same. Raises RunFailed where one
    sequence alone does not fit, and with several ranks at once: one cannot repeat a step alone.
    """
    random_before = random_state()  # a step tried again draws the dropout of the first attempt
    while True:
        try:
            return backward(run, batches, targets)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if run.ranks.world_size > 1:
            raise RunFailed(
                f"rank {run.ranks.rank} ran out of memory: give a smaller --pretrain_batch_size or "
                "--batch_size (with --global_batch_size the training stays the same), "
                "--activation_checkpointing or --parallel fsdp"
            )
        # Outside of the handler, whose traceback holds on to the activations.
        run.optimizer.zero_grad(set_to_none=True)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        restore_random_state(random_before)
        halve_micro_batch(run.progress, max(len(batch.inputs[0]) for batch in batches))


def halve_micro_batch(progress: Progress, rows: int) -> None:
    """Train on micro-batches of `rows` sequences in twice as many parts as so far, and say so."""
    if progress.split >= rows:
        raise RunFailed(
            "out of memory with one sequence at a time: try --activation_checkpointing, a shorter "
            "--max_seq_len, a smaller model or --dtype bfloat16"
        )
    progress.split *= 2
    tqdm.write(
        f"out of memory: from here on each micro-batch of {rows} is trained on in "
        f"{progress.split} parts; batch, data order and learning rate stay as they are"
    )


def update(run: Run, batches: list[Batch], loss: float, grad_norm: float) -> None:
    """Update the weights, or skip the update where a number is not finite, and say where."""
    # Gradients that overflow float16: the scaler skips the update and halves its scale. At a scale
    # below 1 it is not their size that is wrong.
    is_sound = math.isfinite(loss) and (
        math.isfinite(grad_norm) or (run.scaler.is_enabled() and run.scaler.get_scale() > 1)
    )
    if is_sound:
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if is_sound:
        run.progress.skipped = 0
        return
    run.progress.skipped += 1
    what = "gradient" if math.isfinite(loss) else "loss"
    tqdm.write(
        f"step {run.progress.step + 1:,} skipped: its {what} is not finite "
        f"({run.progress.skipped} in a row); it trained on {describe_sequences(run, batches)}"
    )


def describe_sequences(run: Run, batches: list[Batch]) -> str:
    """Where the sequences of a step are, those of all ranks. Every rank must call this."""
    own = [int(number) for batch in batches for number in batch.numbers]
    numbers = [number for of_rank in run.ranks.gather(own) for number in of_rank]
    places = "; ".join(run.task.locate(number) for number in numbers[:SHOWN_PLACES])
    more = len(numbers) - SHOWN_PLACES
    return places + (f"; and {more} more" if more > 0 else "")


def roll_back(run: Run) -> None:
    """Go back to the last good checkpoint with half the learning rate, as --on_nonfinite says.

    Raises RunFailed where that was asked, is not possible, or did not help often enough.
    """
    progress, options = run.progress, run.options
    bad = f"{MAX_SKIPPED} steps in a row, up to step {progress.step:,}, were not finite"
    remedy = "try a lower --pretrain_lr or --lr, or --dtype float32"
    if options.on_nonfinite == "stop":
        raise RunFailed(f"{bad}: {remedy}; the last checkpoint is as it was")
    run.checkpoints.wait()  # it may be the last good one
    lr_scale = progress.lr_scale / 2
    if lr_scale < 2.0**-MAX_ROLLBACKS:
        raise RunFailed(f"{bad}, even with 1/{2**MAX_ROLLBACKS} of the learning rate: {remedy}")
    found = read_on_ranks(run.ranks, lambda: run.folder.last_good(run.run_id, progress.step))
    if found is None:
        raise RunFailed(f"{bad}, and there is no earlier checkpoint to go back to: {remedy}")
    run.restore(found[1])
    run.ranks.on_main(lambda: run.folder.set_aside_later(run.run_id, progress.step))
    run.checkpoints.drop(run.folder.file("best-model.pt").name)
    run.check_best()
    progress.lr_scale = lr_scale
    tqdm.write(f"{bad}: back to step {progress.step:,}, with {lr_scale:g} of the learning rate")


def every(interval: int, step: int) -> bool:
    """Whether something done every `interval` steps (0: never) is due after `step` of them."""
    return bool(interval) and step % interval == 0
