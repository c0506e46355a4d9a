"""The train loop that all tasks share, from the batch to the checkpoint.

Read from top to bottom: `train` is the loop, `optimizer_step` one step of it; below them are the
guards for memory and for numbers that are not finite, and the rollback after ten such steps in a
row. Every rank runs this code, and what is decided here is the same on each.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from tqdm import tqdm

from minllama.cli.console import say, show_record, training_bar
from minllama.machine.device import autocast, is_out_of_memory, training_arithmetic, used_memory
from minllama.machine.gpus import peak_flops
from minllama.machine.random_state import random_state, restore_random_state
from minllama.machine.sharding import is_dtensor, no_gradient_sync
from minllama.runs.checkpoints import read_on_main
from minllama.runs.metrics import Metrics, finite_or_none
from minllama.runs.telemetry import BACKWARD, DATA, OPTIMIZER, gpu_telemetry, profiled
from minllama.system.errors import Interrupted, RunFailed, TextLost
from minllama.training.run import Progress, Run
from minllama.training.task import Batch, StepBatch
from optimizer import learning_rate, set_learning_rate

MAX_SKIPPED = 10  # updates in a row that may be skipped for numbers that are not finite
MAX_ROLLBACKS = 4  # each halves the learning rate
SHOWN_PLACES = 4  # of the sequences of a skipped step

# ---------------------------------------------------------------------------- the loop


OnStep = Callable[[dict[str, Any]], None]  # gets each step's record, as metrics.jsonl has it


def train(run: Run, on_step: OnStep | None = None) -> bool:
    """Train from where the run is to the plan's last step, or until asked to stop.

    Returns whether it was asked to stop. Each step makes one record of the metrics, which on rank 0
    a caller's `on_step` gets, too. Every rank must call this.
    """
    plan, task, options, progress = run.plan, run.task, run.options, run.progress
    ranks, checkpoints = run.ranks, run.checkpoints
    peak = ranks.world_size * peak_flops(run.device, run.dtype)  # FLOP/s; MFU is the share reached
    flops_per_token, sample_gpu = plan.flops_per_token(), gpu_telemetry(run.device)
    metrics = Metrics(
        run.folder,
        progress.recorded,
        last_step=lambda: run.last_step,
        save=checkpoints.save_file,
        tensorboard=options.tensorboard,
        enabled=ranks.is_main,
    )
    bar = training_bar(progress.step, run.last_step, run.deadline and run.deadline.seconds_left)
    first_step = progress.step + 1
    profile = profiled(
        run.folder.file("profile.json.gz"),
        enabled=options.profile and ranks.is_main,
        device=run.device,
        save=checkpoints.save_file,
    )
    # Prefetched for a GPU, which would wait for its batches. On a CPU a batch takes a thousandth of
    # a step, and the thread would take a core from the training.
    batches = Prefetch(task.step_batch, enabled=run.device.type != "cpu")
    checkpoints.after_step(progress.step)
    task.model.train()
    task.warm_up()
    with checkpoints, metrics, bar, batches, profile as end_of_profiled_step:
        while run.has_more() and not run.should_stop():
            try:
                # A run that was stopped during an evaluation resumes with its last step's record.
                record = progress.pending or optimizer_step(run, batches)
            except TextLost as lost:
                run.stop_for(lost)
                continue
            end_of_profiled_step()
            if progress.skipped >= MAX_SKIPPED:
                roll_back(run)
                metrics.rewind(progress.recorded)
                bar.n = progress.step
                continue
            progress.pending = record
            run.adjust_last_step()
            bar.total = run.last_step

            # Evaluate: at the end of an epoch, every --eval_interval steps, and at the run's end.
            epoch, steps_into_epoch = divmod(progress.step, plan.steps_per_epoch)
            ends_epoch, ends_run = steps_into_epoch == 0, progress.step == run.last_step
            chooses_best = ends_run or is_due(task.eval_interval, progress.step)
            if ends_epoch and task.best_interval:
                chooses_best |= epoch % task.best_interval == 0
            if chooses_best or (ends_epoch and task.best_interval):
                try:
                    record |= run.evaluate(sample=True)
                except Interrupted:
                    break  # the checkpoint keeps the record, so the resumed run evaluates it
                except TextLost as lost:
                    run.stop_for(lost)
                    break

            # Record.
            progress.pending = None
            record["mfu"] = record["tokens_per_second"] * flops_per_token / peak
            metrics.append(record := record | sample_gpu())
            if on_step is not None and ranks.is_main:
                on_step(record)
            if progress.step == first_step:
                bar.unpause()  # the speed of later steps: this one has compiled, or taken memory
            show_record(bar, record)
            checkpoints.after_step(progress.step)

            # Save.
            if chooses_best and run.note_best(record):
                run.save_best()
            ends_run |= run.out_of_patience()
            keeps_epoch = ends_epoch and (ends_run or epoch % options.save_interval == 0)
            saves = keeps_epoch or ends_run or is_due(options.checkpoint_interval, progress.step)
            if saves or checkpoints.is_due_again():
                metrics.sync()  # no checkpoint may be newer than the records on the disk
                run.save(run.folder.epoch_checkpoint(epoch) if keeps_epoch else None)
        stopped = run.should_stop(at_end=True)
        if stopped:
            metrics.state = "stopped"
            metrics.sync()
            run.save()
            checkpoints.finish()
        if run.stop.failure:
            raise RunFailed(
                f"{run.stop.failure}: stopped after step {progress.step:,}, and saved; the same "
                "command with --resume auto continues"
            )
    if not stopped and run.out_of_patience():
        say(f"stopped: no better {task.goal} in {options.early_stopping} evaluations in a row")
    return stopped


def is_due(interval: int, step: int) -> bool:
    """Whether something done every `interval` steps (0: never) is due after `step` of them."""
    return bool(interval) and step % interval == 0


# ---------------------------------------------------------------------------- one step


def optimizer_step(run: Run, batches: Prefetch) -> dict[str, Any]:
    """Train on the run's next batch; returns the step's record.

    The gradient is that of the mean loss over all targets of the step, on all ranks, so gradient
    accumulation, ragged batches and any number of ranks equal one big batch.
    """
    started = time.perf_counter()
    progress, plan, options = run.progress, run.plan, run.options
    lr = progress.lr_scale * learning_rate(
        progress.pace.schedule_position(progress.step, plan.schedule_steps),
        peak_lr=options.peak_lr(),
        min_lr=options.min_lr,
        warmup_steps=plan.warmup_steps,
        total_steps=plan.schedule_steps,
        scheduler=options.lr_scheduler,
    )
    set_learning_rate(run.optimizer, lr)
    with record_function(DATA):
        batch = batches.get(progress.step, prefetch_next=progress.step + 1 < run.last_step)
        micro_batches = [part.to(run.device) for part in batch.micro_batches]
    targets = max(1, batch.target_count)  # none at all: a loss of 0, not NaN
    with training_arithmetic(run.device, run.dtype, deterministic=options.deterministic):
        with record_function(BACKWARD):
            loss_sum = backward_in_parts(run, micro_batches, targets)
        with record_function(OPTIMIZER):
            run.scaler.unscale_(run.optimizer)
            parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
            grad_norm = nn.utils.clip_grad_norm_(parameters, options.grad_clip or math.inf)
            loss_sum, grad_norm, memory = reduce_over_ranks(run, loss_sum, grad_norm)
            loss = loss_sum / targets
            update(run, batch, loss, grad_norm)
    progress.step += 1
    progress.tokens += batch.token_count
    return {
        "step": progress.step,
        "epoch": (progress.step - 1) // plan.steps_per_epoch + 1,
        "tokens": progress.tokens,
        "loss": finite_or_none(loss),
        "val_loss": None,
        "lr": lr,
        "grad_norm": finite_or_none(grad_norm),
        "tokens_per_second": batch.token_count / (time.perf_counter() - started),
        "memory": int(memory) or None,
    }


def backward(run: Run, micro_batches: list[Batch], targets: float) -> Tensor:
    """Add up the gradients of the step's mean loss; returns the sum of this rank's losses, ()."""
    loss_sum = torch.zeros((), device=run.device)
    # Each backward() adds to the gradients, and DDP and FSDP average them over the ranks: with this
    # divisor the average is the gradient of the mean loss.
    divisor = targets / run.ranks.world_size
    run.task.split = run.progress.split
    parts = [inputs for batch in micro_batches for inputs in batch.parts(run.task.split)]
    for number, inputs in enumerate(parts, start=1):
        last = number == len(parts)  # then the ranks reduce what they accumulated
        with contextlib.nullcontext() if last else no_gradient_sync(run.task.parallel):
            with autocast(run.device, run.dtype):
                loss = run.task.loss(*inputs)
            run.scaler.scale(loss / divisor).backward()
        loss_sum += loss.detach()
    return loss_sum


def reduce_over_ranks(run: Run, loss_sum: Tensor, grad_norm: Tensor) -> tuple[float, float, float]:
    """All ranks' losses summed up, the gradient's norm, and the bytes used; they agree to stop.

    The only point in a step where the host waits for the device and, apart from the gradients, the
    ranks for each other: so to agree here whether to stop after it costs nothing.
    """
    if is_dtensor(grad_norm):
        grad_norm = grad_norm.full_tensor()
    computed = torch.stack((loss_sum, grad_norm.to(loss_sum)))
    known = (used_memory(run.device) or 0, run.stop_signal())
    losses, norms, memories, stops = zip(*run.ranks.gather_numbers(computed, *known), strict=True)
    run.agree_to_stop(stops)
    return sum(losses), norms[0], sum(memories)


def update(run: Run, batch: StepBatch, loss: float, grad_norm: float) -> None:
    """Update the weights, or skip the update where a number is not finite, and say where."""
    # Gradients that overflow float16: the scaler skips the update and halves its scale. At a scale
    # of 1 or less an overflow is no explanation: the gradients themselves are not finite.
    is_finite = math.isfinite(loss) and (
        math.isfinite(grad_norm) or (run.scaler.is_enabled() and run.scaler.get_scale() > 1)
    )
    if is_finite:
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if is_finite:
        run.progress.skipped = 0
        return
    run.progress.skipped += 1
    what = "gradient" if math.isfinite(loss) else "loss"
    tqdm.write(
        f"step {run.progress.step + 1:,} skipped: its {what} is not finite "
        f"({run.progress.skipped} in a row); it trained on {describe_sequences(run, batch)}"
    )


class Prefetch:
    """Makes the next step's batch in a thread while the current step trains.

    `make(step)` has to be a function of the step alone, and runs in one thread within the block,
    never twice at once. Outside of the block, or not `enabled`, each is made when it is asked for.
    """

    def __init__(self, make: Callable[[int], StepBatch], *, enabled: bool) -> None:
        self.make, self.enabled = make, enabled
        self.thread: ThreadPoolExecutor | None = None
        self.next: tuple[int, Future[StepBatch]] | None = None

    def get(self, step: int, *, prefetch_next: bool) -> StepBatch:
        """The batch of a step; with `prefetch_next` the next one is begun.

        What making it raised is raised here. After a rollback the one that was begun is dropped.
        """
        if self.thread is None:
            return self.make(step)
        prefetched, self.next = self.next, None
        if prefetched is None or prefetched[0] != step:
            prefetched = (step, self.thread.submit(self.make, step))
        batch = prefetched[1].result()
        if prefetch_next:
            self.next = (step + 1, self.thread.submit(self.make, step + 1))
        return batch

    def __enter__(self) -> Prefetch:
        if self.enabled:
            self.thread = ThreadPoolExecutor(1, "prefetch")
        return self

    def __exit__(self, *_: Any) -> None:
        thread, self.thread, self.next = self.thread, None, None
        if thread is not None:
            thread.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------- guards


def backward_in_parts(run: Run, micro_batches: list[Batch], targets: float) -> Tensor:
    """`backward`, with micro-batches halved as often as it takes to fit the memory.

    The step's sequences, their order and the update stay the same. Raises RunFailed where one
    sequence alone does not fit, and with several ranks at once: one cannot repeat a step alone.
    """
    # A retried step must draw the same dropout masks.
    random_before = random_state() if run.task.uses_rng and run.ranks.world_size == 1 else None
    while True:
        try:
            return backward(run, micro_batches, targets)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if run.ranks.world_size > 1:
            raise RunFailed(
                f"rank {run.ranks.rank} ran out of memory: give a smaller --pretrain_batch_size or "
                "--batch_size (with --global_batch_size the training stays the same), "
                "--activation_checkpointing or --parallel fsdp"
            )
        # Outside of the handler: its traceback keeps the activations alive.
        run.optimizer.zero_grad(set_to_none=True)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        if random_before is not None:
            restore_random_state(random_before)
        halve_micro_batch(run.progress, max(len(batch.inputs[0]) for batch in micro_batches))


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


def describe_sequences(run: Run, batch: StepBatch) -> str:
    """Where the sequences of a step are, those of all ranks."""
    indices = batch.indices.tolist()
    places = "; ".join(run.task.locate(index) for index in indices[:SHOWN_PLACES])
    more = len(indices) - SHOWN_PLACES
    return places + (f"; and {more} more" if more > 0 else "")


def roll_back(run: Run) -> None:
    """Go back to the last good checkpoint with half the learning rate, as --on_nonfinite says.

    Raises RunFailed with --on_nonfinite stop, without an earlier good checkpoint, and after
    MAX_ROLLBACKS.
    """
    progress, options = run.progress, run.options
    bad = f"{MAX_SKIPPED} steps in a row, up to step {progress.step:,}, were not finite"
    remedy = "try a lower --pretrain_lr or --lr, or --dtype float32"
    if options.on_nonfinite == "stop":
        raise RunFailed(f"{bad}: {remedy}; the last checkpoint is as it was")
    run.checkpoints.join()  # it may be the last good one
    lr_scale = progress.lr_scale / 2
    if lr_scale < 2.0**-MAX_ROLLBACKS:
        raise RunFailed(f"{bad}, even with 1/{2**MAX_ROLLBACKS} of the learning rate: {remedy}")
    good = read_on_main(run.ranks, lambda: run.folder.last_good(run.run_id, progress.step))
    if good is None:
        raise RunFailed(f"{bad}, and there is no earlier checkpoint to go back to: {remedy}")
    _, state = good
    run.restore(state)
    run.ranks.on_main(lambda: run.folder.set_aside_later(run.run_id, progress.step))
    run.checkpoints.list_own(run.run_id)
    run.checkpoints.drop(run.folder.file("best-model.pt").name)
    run.check_best()
    progress.lr_scale = lr_scale
    tqdm.write(f"{bad}: back to step {progress.step:,}, with {lr_scale:g} of the learning rate")
