"""One optimizer step: an accumulation window's gradients, on all ranks, and the update.

A window that does not fit the memory is trained on in parts; an update that is not finite is
skipped.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from tqdm import tqdm

from minllama.machine.device import autocast, is_out_of_memory, training_arithmetic, used_memory
from minllama.machine.random_state import random_state, restore_random_state
from minllama.machine.sharding import is_dtensor, no_gradient_sync
from minllama.runs.metrics import finite_or_none
from minllama.runs.telemetry import PHASES
from minllama.system.errors import RunFailed
from minllama.training.run import Progress, Run
from minllama.training.task import Batch, Window
from optimizer import learning_rate, set_learning_rate

SHOWN_PLACES = 4  # of the sequences of a skipped step


def optimizer_step(run: Run) -> dict[str, Any]:
    """Train on one accumulation window; returns the step's record.

    The gradient is that of the mean loss over all targets of the window, on all ranks, so
    accumulation, ragged batches and any number of ranks equal one big batch.
    """
    started = time.perf_counter()
    progress = run.progress
    lr = progress.lr_scale * learning_rate(
        progress.pace.at(progress.step, run.plan.schedule_steps),
        peak_lr=run.options.peak_lr(),
        min_lr=run.options.min_lr,
        warmup_steps=run.plan.warmup_steps,
        total_steps=run.plan.schedule_steps,
        scheduler=run.options.lr_scheduler,
    )
    set_learning_rate(run.optimizer, lr)
    with record_function(PHASES[0]):
        window = run.windows.get(progress.step, more=progress.step + 1 < run.last_step)
        batches = [batch.to(run.device) for batch in window.batches]
    targets = max(1, window.targets)  # none at all: a loss of 0, not NaN
    deterministic = run.options.deterministic
    with training_arithmetic(run.device, run.dtype, deterministic=deterministic):
        with record_function(PHASES[1]):
            loss_sum = backward_in_parts(run, batches, targets)
        with record_function(PHASES[2]):
            run.scaler.unscale_(run.optimizer)
            parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
            grad_norm = nn.utils.clip_grad_norm_(parameters, run.options.grad_clip or math.inf)
            loss_sum, grad_norm, memory = exchange(run, loss_sum, grad_norm)
            loss = loss_sum / targets
            update(run, window, loss, grad_norm)
    progress.step += 1
    progress.tokens += window.tokens
    return {
        "step": progress.step,
        "epoch": (progress.step - 1) // run.plan.steps_per_epoch + 1,
        "tokens": progress.tokens,
        "loss": finite_or_none(loss),
        "val_loss": None,
        "lr": lr,
        "grad_norm": finite_or_none(grad_norm),
        "tokens_per_second": window.tokens / (time.perf_counter() - started),
        "memory": int(memory) or None,
    }


def exchange(run: Run, loss_sum: Tensor, grad_norm: Tensor) -> tuple[float, float, float]:
    """The sum of all ranks' losses, their gradient's norm, and the bytes that they use.

    Here alone in a step the host waits for the device, and the ranks for each other beside their
    gradients; so they agree here, too, whether to stop after it.
    """
    if is_dtensor(grad_norm):
        grad_norm = grad_norm.full_tensor()
    computed = torch.stack((loss_sum, grad_norm.to(loss_sum)))
    known = (used_memory(run.device) or 0, run.stop_number())
    losses, norms, memories, stops = zip(*run.ranks.gather_numbers(computed, *known), strict=True)
    run.agree_to_stop(stops)
    return sum(losses), norms[0], sum(memories)


def backward(run: Run, batches: list[Batch], targets: float) -> Tensor:
    """Sum up the gradients of the window's mean loss; returns the sum of this rank's losses, ()."""
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
    return loss_sum


def backward_in_parts(run: Run, batches: list[Batch], targets: float) -> Tensor:
    """`backward`, with micro-batches halved as often as it takes to fit the memory.

    The window's sequences, their order and the update stay the same. Raises RunFailed where one
    sequence alone does not fit, and with several ranks at once: one cannot repeat a step alone.
    """
    # A step tried again draws the dropout of the first attempt.
    random_before = random_state() if run.task.draws and run.ranks.world_size == 1 else None
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
        if random_before is not None:
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


def update(run: Run, window: Window, loss: float, grad_norm: float) -> None:
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
        f"({run.progress.skipped} in a row); it trained on {describe_sequences(run, window)}"
    )


def describe_sequences(run: Run, window: Window) -> str:
    """Where the sequences of a step are, those of all ranks."""
    numbers = window.numbers.tolist()
    places = "; ".join(run.task.locate(number) for number in numbers[:SHOWN_PLACES])
    more = len(numbers) - SHOWN_PLACES
    return places + (f"; and {more} more" if more > 0 else "")
