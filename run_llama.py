"""Pretrain a small Llama from scratch, then finetune, prompt and generate with it.

    python run_llama.py --option pretrain
    python run_llama.py --option finetune
    python run_llama.py --option prompt
    python run_llama.py --option generate --prompt "Once upon a time"
    python run_llama.py --help

The parts stand in the other modules; here they are put together: one train loop that pretraining
and finetuning share, and a function for each option.
"""

from __future__ import annotations

import signal
import sys

from config import parse_options, parse_or_exit

if __name__ == "__main__":  # --help and bad flags are answered before torch, which takes seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback till then
    OPTIONS_GIVEN = parse_or_exit(parse_options, "run_llama.py", sys.argv[1:])

import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import shlex
import statistics
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.profiler import record_function
from tqdm import tqdm

from config import (
    ANEW_ON_RESUME,
    DATA_DIR,
    IGNORE_INDEX,
    SHIPPED_MODEL,
    Options,
    RunFailed,
    TrainingPlan,
    UsageError,
    find_idle_flags,
    find_problems,
    human_size,
    human_time,
    report_usage_error,
)
from llama import (
    Llama,
    LlamaEmbeddingClassifier,
    LlamaZeroShotClassifier,
    NextTokenLoss,
    Sampling,
    add_lora,
    common_prefix,
    compile_step,
    generate_tokens,
    load_pretrained,
    merge_lora,
    model_payload,
)
from optimizer import AdamW, MuonAndAdamW, layer_matrices, learning_rate, parameter_groups
from tokenizer import (
    JSON_SUFFIXES,
    TEXT_SUFFIXES,
    Reading,
    TextSource,
    Tokenizer,
    find_text_files,
    is_labelled,
    vocabulary_remedy,
)
from utils import (
    REPEATS,
    GpuTelemetry,
    Interrupted,
    LlamaDataset,
    MetricsLog,
    NoLog,
    PretrainDataset,
    Ranks,
    RunFolder,
    ShardedSave,
    StopRequest,
    TokenCache,
    available_memory,
    batch_indices,
    bucketed_batches,
    build_or_load,
    check_compiler,
    check_runs_alone,
    check_writable,
    check_writable_file,
    choose_device,
    choose_dtype,
    compiler_problem,
    count_chunks,
    describe_device,
    distribute,
    dtype_name,
    environment,
    exit_at_once,
    free_disk,
    is_lost_peer,
    is_sharded,
    is_share,
    keep_freed_memory,
    load_checkpoint,
    load_sharded,
    load_whole_optimizer,
    load_whole_state,
    loss_curve_svg,
    no_gradients,
    own_tensors,
    peak_flops,
    plain_optimizer_state,
    random_state,
    rank_seed,
    read_labelled,
    read_records,
    restore_random_state,
    save_checkpoint,
    seed_everything,
    size_on_disk,
    split_documents,
    state_file,
    used_memory,
    whole_state,
    whole_stream,
    without_exchange,
    write_text,
    write_trace,
)

BETAS, EPS = (0.9, 0.95), 1e-8  # AdamW's, as Llama was pretrained
EVALUATED = ("val_loss", "val_perplexity", "bits_per_byte", "dev_accuracy", "dev_f1")
MEASURED_STEPS = 10  # after which the time left is told
MAX_SKIPPED = 10  # updates in a row that may be left out for numbers that are not finite
MAX_ROLLBACKS = 4  # each halves the learning rate
CURVE_POINTS = 2000  # of the training loss in its picture
SPIKE_WINDOW, SPIKE_LEAST, SPIKE_STDS = 100, 20, 6.0  # losses looked back on; fewer tell nothing


# ---------------------------------------------------------------------------- the train loop


@dataclass(frozen=True)
class Batch:
    """A micro-batch on the device: what the loss takes, and the targets it sums over."""

    inputs: tuple[torch.Tensor, ...]  # a row for each sequence
    targets: int
    tokens: int
    numbers: Sequence[int] = ()  # the sequences' places in the data set

    def parts(self, count: int) -> list[tuple[torch.Tensor, ...]]:
        """The inputs in `count` parts of about as many rows, fewer where there are fewer rows."""
        rows = -(-len(self.inputs[0]) // count)
        return list(zip(*(tensor.split(rows) for tensor in self.inputs), strict=True))

    def without_targets(self) -> Batch:
        """Its first row with nothing to predict: for a rank to take part in a pass of the others.

        The last of the inputs are the targets or labels.
        """
        *inputs, targets = (tensor[:1] for tensor in self.inputs)
        return Batch((*inputs, torch.full_like(targets, IGNORE_INDEX)), targets=0, tokens=0)


@dataclass(frozen=True)
class Task:
    """What pretraining and finetuning do not share: batches, loss, evaluation, best model."""

    batches: Callable[[int], list[Batch]]  # this rank's micro-batches of step N, on all as many
    loss: Callable[..., torch.Tensor]  # sum of the losses of a micro-batch's targets
    evaluate: Callable[[], dict[str, float]]  # empty where there is nothing to evaluate on
    goal: str  # the metric that chooses the best model
    higher_is_better: bool
    weights: Callable[[], dict[str, Any]]  # the content of a weights file; on rank 0, made by all
    state: Callable[[dict], dict[str, Any]]  # a state dict, as a resumable checkpoint has it
    locate: Callable[[int], str]  # where a sequence of the data set stands, for messages
    best_interval: int = 1  # epochs between looks for a new best
    eval_interval: int = 0  # optimizer steps between evaluations; 0: at epochs' ends only
    patience: int | None = None  # epochs without a new best after which to stop


@dataclass
class Progress:
    """Where a run stands, in plain values; data order and learning rate follow from `step`."""

    step: int = 0  # optimizer steps made
    tokens: int = 0  # trained on
    skipped: int = 0  # updates left out in a row
    lr_scale: float = 1.0  # halved by each rollback
    split: int = 1  # parts that a micro-batch is trained on in, since it did not fit the memory
    first: float | None = None  # the goal before training
    best: float | None = None  # the goal's best value
    best_step: int = 0
    pending: dict[str, Any] | None = None  # the last step's record, not yet evaluated and written


@dataclass
class Files:
    """The writing of a run's files: one that fails is tried again after 1, 2, 4, ... more steps."""

    waiting: dict[str, tuple[Callable[[], None], int, int]] = dataclasses.field(
        default_factory=dict
    )  # what writes each, after which step to try again, and how long was waited

    def write(
        self,
        name: str,
        save: Callable[[], None],
        *,
        step: int,
        keep: Callable[[], Callable[[], None]] | None = None,
        wait: int = 1,
    ) -> None:
        """Write a file that the run can go on without; the one it would replace stays whole.

        `keep` makes what writes it later, where that cannot be `save` itself.
        """
        try:
            save()
            self.waiting.pop(name, None)
        except OSError as error:
            again = f"tries again in {wait} step{'s' * (wait > 1)}"
            tqdm.write(f"warning: {name} was not written ({error}); the run goes on and {again}")
            self.waiting[name] = (keep() if keep else save, step + wait, min(2 * wait, 64))

    def retry(self, step: int) -> None:
        """Try those again whose time has come."""
        for name, (save, due, wait) in list(self.waiting.items()):
            if step >= due:
                self.write(name, save, step=step, wait=wait)

    def finish(self) -> None:
        """Try everything that is not written a last time; raises RunFailed, a line for each."""
        problems = []
        for name, (save, _, _) in self.waiting.items():
            try:
                save()
            except OSError as error:
                problems.append(f"{name} was not written ({error.strerror or error})")
        self.waiting.clear()
        if problems:
            problems[-1] += "; make room, then the same command with --resume auto ends the run"
            raise RunFailed("\n".join(problems))


@dataclass
class Run:
    """Everything the train loop works on."""

    options: Options
    plan: TrainingPlan
    task: Task
    model: nn.Module
    parallel: nn.Module  # what the task's loss calls: around or of the model, for all ranks
    optimizer: AdamW | MuonAndAdamW
    scaler: torch.amp.GradScaler
    device: torch.device
    dtype: torch.dtype
    folder: RunFolder
    ranks: Ranks
    stop: StopRequest
    identity: dict[str, Any]  # what a resumed run must share with the one it goes on with
    progress: Progress = dataclasses.field(default_factory=Progress)
    run_id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    files: Files = dataclasses.field(default_factory=lambda: Files())
    sharded: ShardedSave | None = None  # writes the checkpoints of a sharded model

    def save(self, path: Path) -> None:
        """Write a resumable checkpoint: everything that is not a flag or a file.

        Of a sharded model it is only begun, under a name that says so. Raises OSError.
        """
        random_states = self.ranks.gather(random_state())
        whole = self.sharded is None
        payload = {
            **self.task.state(whole_state(self.model, self.ranks) if whole else {}),
            "optimizer": (
                self.optimizer.state_dict() if whole else plain_optimizer_state(self.optimizer)
            ),
            "scaler": self.scaler.state_dict(),
            "rng": random_states[0],
            "progress": dataclasses.asdict(self.progress),
            "identity": self.identity,
            "run_id": self.run_id,
            "options": self.options.to_plain(),
        }
        if self.ranks.world_size > 1:
            payload["rng_of_ranks"] = random_states
        if whole:
            self.ranks.on_main(lambda: save_checkpoint(path, payload))
        else:
            tensors = own_tensors(self.model, self.optimizer)
            self.sharded.begin(path.with_name(f"{path.stem}-sharded"), tensors, payload)

    def restore(self, payload: dict[str, Any]) -> None:
        """Take over a checkpoint's state; its identity has been checked.

        Raises UsageError where it holds other things than this program writes.
        """
        try:
            if "restore_from" in payload:
                folder = payload["restore_from"]
                load_sharded(folder, self.model, self.optimizer, payload["optimizer"])
            else:
                load_whole_state(self.model, payload["model"])
                load_whole_optimizer(self.optimizer, payload["optimizer"])
            self.scaler.load_state_dict(payload["scaler"])
            vars(self.progress).update(vars(Progress(**payload["progress"])))
            random_states = payload.get("rng_of_ranks", [payload["rng"]])
            if len(random_states) == self.ranks.world_size:
                restore_random_state(random_states[self.ranks.rank])
            else:
                seed_rank(self)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if is_lost_peer(error):
                raise
            reason = str(error).strip().split("\n")[0]
            raise UsageError(f"the checkpoint is not one of this program ({reason})") from None
        self.run_id = payload.get("run_id", self.run_id)
        if self.ranks.world_size > 1:
            self.progress.split = 1  # several processes train on micro-batches as given

    def checkpoint(self, path: Path | None = None, *, wait: bool = True) -> None:
        """Save, by default named after the step, and delete what is old by now. Raises OSError.

        A sharded checkpoint is published only if `wait`, and any that was begun before it.
        """
        step, skipped = self.progress.step, self.progress.skipped
        self.publish()
        self.save(path or self.folder.step_checkpoint(step))
        if self.sharded is None:
            self.prune(step, skipped)
        elif wait:
            self.publish()

    def publish(self) -> None:
        """Finish the sharded checkpoint that was begun, if any. Raises OSError."""
        payload = self.sharded and self.sharded.publish()
        if payload:
            self.prune(payload["progress"]["step"], payload["progress"]["skipped"])

    def prune(self, step: int, skipped: int) -> None:
        """Delete what is old by now, after the checkpoint of `step`."""
        if self.ranks.is_main and not skipped:  # else the last good one may be among them
            self.folder.prune(self.options.keep_last, run_id=self.run_id, step=step)


def train(run: Run) -> bool:
    """Train from where `run.progress` stands to the plan's last step, or until asked to stop.

    Returns whether it was asked to stop. Each step makes one record. What follows a step
    (evaluation, best model, checkpoint) is decided by its number alone, so a run stopped anywhere
    and resumed ends as if it had never stopped. Several ranks go through this side by side: what is
    decided here is the same on each, and `ranks` is where they meet and where rank 0 is alone.
    """
    plan, task, options, progress = run.plan, run.task, run.options, run.progress
    ranks, stop = run.ranks, run.stop
    telemetry = GpuTelemetry(run.device)
    peak = ranks.world_size * peak_flops(run.device, run.dtype)
    flops = plan.flops_per_token()
    done = progress.step - bool(progress.pending)  # steps whose record is complete
    path = run.folder.file("metrics.jsonl")
    log = MetricsLog(path, done, window=SPIKE_WINDOW) if ranks.is_main else NoLog()
    bar = tqdm(
        total=plan.last_step,
        initial=progress.step,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,  # seconds; a log needs few lines
    )
    first_step, started = progress.step, time.perf_counter()
    run.model.train()
    settle_exchange(run)
    with contextlib.closing(log), bar, profiled(run) as step_made:
        while goes_on(task, plan, progress) and not ranks.agree_to_stop(stop):
            record = progress.pending or optimizer_step(run)
            step_made()
            if progress.skipped >= MAX_SKIPPED:
                roll_back(run)
                log.rewind(progress.step - bool(progress.pending))
                bar.n = progress.step
                continue
            progress.pending = record
            epoch, steps_into_epoch = divmod(progress.step, plan.steps_per_epoch)
            ends_epoch, ends_run = steps_into_epoch == 0, progress.step == plan.last_step
            choose_best = ends_run or every(task.eval_interval, progress.step)
            choose_best |= ends_epoch and epoch % task.best_interval == 0
            if ends_epoch or choose_best:
                try:
                    record |= task.evaluate()
                except Interrupted:
                    break  # the checkpoint keeps the record, so the resumed run evaluates it
            progress.pending = None
            record["mfu"] = record["tokens_per_second"] * flops / peak
            note_spike(record, log.records)
            log.append(record | telemetry.sample())
            show(bar, record)
            if progress.step == first_step + 1:  # the first one compiles, or warms up
                started = time.perf_counter()
            if progress.step == first_step + 1 + MEASURED_STEPS < plan.last_step:
                a_step = (time.perf_counter() - started) / MEASURED_STEPS
                left = human_time((plan.last_step - progress.step) * a_step)
                bar.write(f"about {left} left, evaluations apart")
            run.files.retry(progress.step)
            publish_checkpoint(run, wait=False)
            if choose_best and is_new_best(task, progress, record):
                write_weights(run, "best-model.pt")
            ends_run |= out_of_patience(task, plan, progress)
            if ends_epoch and (ends_run or epoch % options.save_interval == 0):
                write_checkpoint(run, run.folder.epoch_checkpoint(epoch))
            elif ends_run or every(options.checkpoint_interval, progress.step):
                write_checkpoint(run, run.folder.step_checkpoint(progress.step))
    stopped = ranks.agree_to_stop(stop)
    if stopped:
        write_checkpoint(run, run.folder.step_checkpoint(progress.step))
    publish_checkpoint(run)
    if stopped:
        run.files.finish()
    elif out_of_patience(task, plan, progress):
        print(f"stopped: no better {task.goal} for {task.patience} epochs")
    return stopped


def optimizer_step(run: Run) -> dict[str, Any]:
    """Train on one accumulation window; returns the step's record.

    The gradient is that of the mean loss over all targets of the window, on all ranks, so
    accumulation, ragged batches and any number of ranks equal one big batch.
    """
    started = time.perf_counter()
    plan, progress, ranks = run.plan, run.progress, run.ranks
    lr = progress.lr_scale * learning_rate(
        progress.step,
        peak_lr=run.options.peak_lr(),
        min_lr=run.options.min_lr,
        warmup_steps=plan.warmup_steps,
        total_steps=plan.schedule_steps,
        scheduler=run.options.lr_scheduler,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    with record_function("data"):
        batches = run.task.batches(progress.step)
    targets, tokens = ranks.sum(sum(b.targets for b in batches), sum(b.tokens for b in batches))
    targets = max(1, targets)  # none at all: a loss of 0, not NaN
    with record_function("forward and backward"):
        loss_sum = backward_in_parts(run, batches, targets)
    with record_function("optimizer"):
        run.scaler.unscale_(run.optimizer)
        parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
        grad_norm = nn.utils.clip_grad_norm_(parameters, run.options.grad_clip or math.inf)
        grad_norm = (grad_norm.full_tensor() if is_share(grad_norm) else grad_norm).item()
        loss_sum, memory = ranks.sum(loss_sum, used_memory(run.device) or 0)
        loss = loss_sum / targets
        update(run, batches, loss, grad_norm)
    progress.step += 1
    progress.tokens += int(tokens)
    return {
        "step": progress.step,
        "epoch": (progress.step - 1) // plan.steps_per_epoch + 1,
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
    share = targets / run.ranks.world_size  # for the exchange takes the ranks' mean, not their sum
    parts = [inputs for batch in batches for inputs in batch.parts(run.progress.split)]
    for number, inputs in enumerate(parts, start=1):
        last = number == len(parts)  # then the ranks exchange what has added up
        with contextlib.nullcontext() if last else without_exchange(run.parallel):
            with autocast(run.device, run.dtype):
                batch_loss = run.task.loss(*inputs)
            run.scaler.scale(batch_loss / share).backward()
        loss_sum += batch_loss.detach()
    return loss_sum.item()


def settle_exchange(run: Run) -> None:
    """Pass once through several ranks' exchange of gradients, training nothing.

    After its first pass DDP lays out anew what it adds up, and what three numbers add up to
    depends on where in it they stand. Done before the first step, also of a resumed run, every
    step of both adds up alike, and their weights are the same bit for bit.
    """
    if run.ranks.world_size == 1:
        return
    random_before = random_state()
    batch = run.task.batches(run.progress.step)[0].without_targets()
    with autocast(run.device, run.dtype):
        loss = run.task.loss(*batch.inputs)
    loss.backward()
    run.optimizer.zero_grad(set_to_none=True)
    restore_random_state(random_before)


def backward_in_parts(run: Run, batches: list[Batch], targets: float) -> float:
    """`backward`, with micro-batches halved as often as it takes to fit the memory.

    The window's sequences, their order and the update stay the same: what was one micro-batch is
    accumulated from its parts, in this and all later steps. Raises RunFailed where one sequence
    alone does not fit, and of several ranks at once: one cannot repeat a step that others go
    through.
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


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: on a GPU, or on the CPU, where torch has no exception for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in ("not enough memory", "out of memory"))


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
    """Update the weights, or leave the update out where a number is not finite, and say where."""
    scaling = run.scaler.is_enabled()
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    # Gradients that overflow float16 are the scaler's: it leaves the update out, lowers its scale.
    if finite or (scaling and not math.isfinite(grad_norm)):
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if finite or (scaling and math.isfinite(loss)):
        run.progress.skipped = 0
        return
    run.progress.skipped += 1
    what = "gradient" if math.isfinite(loss) else "loss"
    tqdm.write(
        f"step {run.progress.step + 1:,} skipped: its {what} is not finite "
        f"({run.progress.skipped} in a row); {culprits(run, batches)}"
    )


def culprits(run: Run, batches: list[Batch]) -> str:
    """Which of the step's sequences have, one by one and without dropout, no finite loss."""
    ranks, found = run.ranks, []
    singles = [
        single
        for batch in batches
        if len(batch.numbers)
        for single in zip(batch.numbers, batch.parts(len(batch.numbers)), strict=True)
    ]
    stand_in = (None, batches[0].without_targets().inputs)  # for all ranks go through as many
    missing = max(ranks.gather(len(singles))) - len(singles)
    run.model.eval()
    with no_gradients(run.parallel), autocast(run.device, run.dtype):
        for number, inputs in [*singles, *[stand_in] * missing]:
            if not math.isfinite(run.task.loss(*inputs).item()) and number is not None:
                found.append(number)
    run.model.train()
    found = [number for of_rank in ranks.gather(found) for number in of_rank]
    numbers = [n for of_rank in ranks.gather([n for n, _ in singles]) for n in of_rank]
    if not found:
        return f"each loss alone is finite, the first being of {run.task.locate(numbers[0])}"
    places = "; ".join(run.task.locate(number) for number in found[:2])
    return f"from {places}" + (f" and {len(found) - 2} more" if len(found) > 2 else "")


def roll_back(run: Run) -> None:
    """Go back to the last good checkpoint with half the learning rate, as --on_nonfinite says.

    Raises RunFailed where that was asked, is not possible, or did not help often enough.
    """
    progress, options = run.progress, run.options
    bad = f"{MAX_SKIPPED} steps in a row, up to step {progress.step:,}, were not finite"
    remedy = "try a lower --pretrain_lr or --lr, or --dtype float32"
    if options.on_nonfinite == "stop":
        raise RunFailed(f"{bad}: {remedy}; the last checkpoint is as it was")
    publish_checkpoint(run)  # it may be the last good one
    lr_scale = progress.lr_scale / 2
    if lr_scale < 2.0**-MAX_ROLLBACKS:
        raise RunFailed(f"{bad}, also with 1/{2**MAX_ROLLBACKS} of the learning rate: {remedy}")
    found = read_on_ranks(run.ranks, lambda: run.folder.last_good(run.run_id, progress.step))
    if found is None:
        raise RunFailed(f"{bad}, and there is no earlier checkpoint to go back to: {remedy}")
    run.restore(found[1])
    progress.lr_scale = lr_scale
    tqdm.write(f"{bad}: back to step {progress.step:,}, with {lr_scale:g} of the learning rate")


def note_spike(record: dict[str, Any], earlier: Iterable[dict[str, Any]]) -> None:
    """Report and record a loss far above those before it, in their standard deviations."""
    losses = [r["loss"] for r in earlier if r.get("loss") is not None]
    if record["loss"] is None or len(losses) < SPIKE_LEAST:
        return
    mean, std = statistics.fmean(losses), statistics.stdev(losses)
    if record["loss"] > mean + SPIKE_STDS * std:
        record["loss_spike"] = record["loss"] - mean
        tqdm.write(
            f"loss spike at step {record['step']:,}: {record['loss']:.3f}, where the last "
            f"{len(losses)} were {mean:.3f} +- {std:.3f}"
        )


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Arithmetic in `dtype` on float32 weights; float32 switches it off."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


PHASES = ("data", "forward and backward", "optimizer")  # of optimizer_step, as profiles name them
UNPROFILED_STEPS, PROFILED_STEPS = 2, 5  # the first compile and warm up
PROFILE_ROWS = 12


@contextlib.contextmanager
def profiled(run: Run) -> Iterator[Callable[[], None]]:
    """Profile a few steps where --profile asks for it; yields what to call after every step."""
    if not run.options.profile or not run.ranks.is_main:
        yield lambda: None
        return
    steps = torch.profiler.schedule(
        wait=UNPROFILED_STEPS - 1, warmup=1, active=PROFILED_STEPS, repeat=1
    )
    report = functools.partial(report_profile, run)
    with torch.profiler.profile(schedule=steps, on_trace_ready=report) as profiler:
        yield profiler.step
    if profiler.step_num <= UNPROFILED_STEPS:
        tqdm.write(f"--profile: nothing to show of a run of {UNPROFILED_STEPS} steps or fewer")


def report_profile(run: Run, profiler: torch.profiler.profile) -> None:
    """Print where the profiled steps went, and write their trace into the run's folder."""
    events = {
        event.key: event
        for event in profiler.key_averages()
        if not event.key.startswith(("ProfilerStep*", "Optimizer.step#"))  # brackets around others
    }
    if PHASES[0] not in events:  # torch reports a run that ended while it warmed up, too
        return
    phases = {name: events.pop(name) for name in PHASES}
    steps = phases["data"].count
    total = sum(event.cpu_time_total for event in phases.values())  # in microseconds
    shares = ", ".join(
        f"{'waiting for data' if name == 'data' else name} {event.cpu_time_total / total:.2%}"
        for name, event in phases.items()
    )
    lines = [f"profile of {steps} steps of {total / steps / 1000:,.1f} ms: {shares}"]
    on = "device" if run.device.type == "cuda" else "cpu"
    times = {name: getattr(event, f"self_{on}_time_total") for name, event in events.items()}
    slowest = sorted(times, key=times.get, reverse=True)[:PROFILE_ROWS]
    lines.append(f"  {'operation':<48} calls/step   ms/step   share")
    lines += [
        f"  {name[:48]:<48} {events[name].count / steps:>10,.0f} "
        f"{times[name] / steps / 1000:>9,.2f} {times[name] / total:>7.1%}"
        for name in slowest
    ]
    path = run.folder.file("profile.json.gz")
    run.files.write(path.name, lambda: write_trace(path, profiler), step=run.progress.step)
    tqdm.write("\n".join([*lines, f"  {path}: the same for chrome://tracing or ui.perfetto.dev"]))


def every(interval: int, step: int) -> bool:
    """Whether something done every `interval` steps (0: never) is due after `step` of them."""
    return bool(interval) and step % interval == 0


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def is_new_best(task: Task, progress: Progress, record: dict[str, Any]) -> bool:
    """Note the record's value of the goal, and whether it is the best so far."""
    value = record.get(task.goal)
    if value is None or not math.isfinite(value):
        return False
    if progress.best is not None and (
        value <= progress.best if task.higher_is_better else value >= progress.best
    ):
        return False
    progress.best, progress.best_step = value, progress.step
    return True


def out_of_patience(task: Task, plan: TrainingPlan, progress: Progress) -> bool:
    """Whether, at the end of an epoch, too many have gone by without a new best."""
    if task.patience is None or progress.step % plan.steps_per_epoch:
        return False
    return progress.step - progress.best_step >= task.patience * plan.steps_per_epoch


def goes_on(task: Task, plan: TrainingPlan, progress: Progress) -> bool:
    """Whether there is a step to make, or the last one's record still to complete."""
    if progress.pending:
        return True
    return progress.step < plan.last_step and not out_of_patience(task, plan, progress)


def show(bar: tqdm, record: dict[str, Any]) -> None:
    """Put a step's figures behind the progress bar, an evaluation on a line of its own."""
    shown = {"loss": record["loss"] or math.nan, "lr": record["lr"]}
    bar.set_postfix_str(
        f"loss {shown['loss']:.3f}, lr {shown['lr']:.2e}, {record['tokens_per_second']:,.0f} tok/s",
        refresh=False,
    )
    bar.update()
    metrics = {key: record[key] for key in EVALUATED if record.get(key) is not None}
    if metrics:
        figures = ", ".join(
            f"{key.replace('_', ' ')} {value:,.{0 if value >= 1000 else 4}f}"
            for key, value in metrics.items()
        )
        bar.write(f"epoch {record['epoch']}, step {record['step']:,}: {figures}")


def write_weights(run: Run, name: str) -> None:
    """Write one of the run's weights files, now or, these same weights, later."""
    path, payload = run.folder.file(name), run.task.weights()

    def save(payload: dict[str, Any]) -> None:
        run.ranks.on_main(lambda: save_checkpoint(path, payload))

    def keep() -> Callable[[], None]:  # the payload may be the model's own memory
        return functools.partial(save, copy.deepcopy(payload))

    save_now = functools.partial(save, payload)
    run.files.write(path.name, save_now, step=run.progress.step, keep=keep)


def write_checkpoint(run: Run, path: Path) -> None:
    """Write a resumable checkpoint, now or, of the step the run stands at then, later."""
    save = functools.partial(run.checkpoint, path, wait=False)
    run.files.write("checkpoint", save, step=run.progress.step, keep=lambda: run.checkpoint)


def publish_checkpoint(run: Run, *, wait: bool = True) -> None:
    """Finish a sharded checkpoint that was begun; without `wait` only if it is written by now."""
    if run.sharded is not None and (wait or run.sharded.is_written()):
        step = run.progress.step
        run.files.write("checkpoint", run.publish, step=step, keep=lambda: run.checkpoint)


# ---------------------------------------------------------------------------- before and after


@contextlib.contextmanager
def own_folder(options: Options, prefix: str) -> Iterator[RunFolder]:
    """The run's folder, writable and with no other run of this kind in it; raises UsageError."""
    folder, ranks = RunFolder(options.save_dir, prefix), Ranks.from_environment()
    if options.plan:
        yield folder
        return
    ranks.on_main(lambda: check_writable(folder.path, "--save_dir"))
    with folder.locked(ranks):
        yield folder


def where_it_was(options: Options) -> Options:
    """A run resumed from a file goes on in that file's folder. Raises UsageError for another."""
    if options.resume in (None, "auto"):
        return options
    if Path(options.resume).is_dir() and not state_file(Path(options.resume)).is_file():
        raise UsageError(
            f"--resume {options.resume}: is a folder; --save_dir {options.resume} --resume auto "
            "goes on with the run in it"
        )
    if not state_file(Path(options.resume)).is_file():
        raise UsageError(f"--resume {options.resume}: no such file; auto takes the newest")
    folder = Path(options.resume).parent
    if "save_dir" in options.given and options.save_dir.resolve() != folder.resolve():
        raise UsageError(
            f"--resume {options.resume} lies outside --save_dir {options.save_dir}: a run goes on "
            f"where its files are, so leave --save_dir out or give {folder}"
        )
    return dataclasses.replace(options, save_dir=folder)


def open_run(
    options: Options, folder: RunFolder, ranks: Ranks
) -> tuple[Options, dict[str, Any] | None]:
    """Check that the run may write its folder, and find the checkpoint to go on from, if any.

    Returns it with the options: what was not typed is as the checkpoint has it, and the global
    batch is settled. A run that its launcher restarts goes on, whatever the command says.
    """
    if ranks.on_main(lambda: any(map(ranks.is_launch_of, folder.starts()[-1:]))):
        print(
            "started again: the run of this --rdzv-id goes on"
            + (", and --overwrite is left out; a new id begins anew" if options.overwrite else "")
        )
        options = dataclasses.replace(options, resume="auto", overwrite=False)
    resume, overwrite = options.resume, options.overwrite
    if not options.plan:
        ranks.on_main(lambda: folder.check_free(resume=resume is not None, overwrite=overwrite))
    if resume is None:
        return options.with_global_batch(ranks.world_size), None
    found = read_on_ranks(ranks, lambda: folder.find_checkpoint(resume))
    if found is None:
        print("--resume auto: the run ended before its first checkpoint, so it begins anew")
        return options.with_global_batch(ranks.world_size), None
    path, checkpoint = found
    print(f"resuming     {path}, made after step {checkpoint['progress']['step']:,}")
    before = checkpoint.get("options", {})
    options = options.resumed(before | global_batch(checkpoint["identity"]))
    problems = find_problems(options)  # among flags typed now and those the checkpoint brings
    if problems:
        raise UsageError("\n".join(problems))
    options = options.with_global_batch(ranks.world_size)
    now = options.to_plain()
    for name in sorted(options.given - ANEW_ON_RESUME):
        if name in before and before[name] != now[name]:
            print(f"changed      --{name} from {before[name]} to {now[name]}")
    return options, checkpoint


def read_on_ranks(
    ranks: Ranks, find: Callable[[], tuple[Path, dict[str, Any]] | None]
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that rank 0 finds and verifies, read by every rank."""
    found = None

    def find_path() -> Path | None:
        nonlocal found
        found = find()
        return found and found[0]

    path = ranks.on_main(find_path)
    if path is None:
        return None
    return ranks.on_all(lambda: found or (path, load_checkpoint(path, verify=False)))


GLOBAL_BATCH = (
    "--global_batch_size (--pretrain_batch_size or --batch_size x --gradient_accumulation_steps x "
    "processes)"
)


def global_batch(identity: dict[str, Any]) -> dict[str, int]:
    """The global batch of a checkpoint, as an option; of older ones, made by one process, too."""
    steps = identity.get("--gradient_accumulation_steps", 1)
    micro = identity.get("--pretrain_batch_size", identity.get("--batch_size", 1))
    return {"global_batch_size": identity.get(GLOBAL_BATCH, micro * steps)}


def check_identity(checkpoint: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise UsageError, a line each, for what a checkpoint was made with and this run is not."""
    made_with = {"--optimizer": "adamw"} | checkpoint["identity"]  # before there was a choice
    made_with |= {GLOBAL_BATCH: global_batch(made_with)["global_batch_size"]}
    problems = []
    for name, value in identity.items():
        before = made_with.get(name)
        if before == value:
            continue
        if isinstance(value, dict) and isinstance(before, dict):  # of a shape, what differs
            differs = [key for key in value if before.get(key) != value[key]]
            value = ", ".join(f"{key} {value[key]}" for key in differs)
            before = ", ".join(str(before.get(key)) for key in differs)
        problems.append(
            f"{name} {value} differs from the checkpoint's {before}: a run is resumed with what "
            "it was started with"
        )
    if problems:
        raise UsageError("\n".join(problems))


def make_plan(
    options: Options, ranks: Ranks, device: torch.device, dtype: torch.dtype, **sizes: Any
) -> TrainingPlan:
    """The plan of a run: what the flags say, and the sizes of the task's model and data."""
    return TrainingPlan(
        micro_batch_size=options.micro_batch_size,
        accumulation_steps=options.global_batch_size
        // (options.micro_batch_size * ranks.world_size),
        world_size=ranks.world_size,
        epochs=options.epochs,
        max_steps=options.max_steps,
        warmup_steps_given=options.warmup_steps,
        dtype=dtype_name(dtype),
        device=device.type,
        activation_checkpointing=options.activation_checkpointing,
        keep_last=options.keep_last,
        checkpoints_kept=1 + options.epochs // options.save_interval,
        parallel=options.parallel,
        **sizes,
    )


def warn_of_plan(plan: TrainingPlan, available: int | None) -> None:
    """Say what of a plan will not fit or not do what it is there for."""
    needed = sum(plan.memory().values())
    if available is not None and needed > available:
        sharded = ", --parallel fsdp" if plan.world_size > 1 and plan.parallel == "ddp" else ""
        print(
            f"warning: about {human_size(needed)} of memory are needed and {human_size(available)} "
            f"are free: try --activation_checkpointing{sharded}, a smaller batch with more "
            "--gradient_accumulation_steps, or a smaller model"
        )
    if plan.warmup_steps >= plan.last_step > 1:
        print(
            f"warning: warmup takes {plan.warmup_steps:,} steps (--warmup_steps) and the run ends "
            f"after {plan.last_step:,}: the full learning rate is never reached"
        )
    if plan.sequences < plan.sequences_per_step:
        print(
            f"note: a step takes up to {plan.sequences_per_step:,} sequences and there are "
            f"{plan.sequences:,}: each epoch is one step on all of them"
        )


def print_plan(options: Options, plan: TrainingPlan, device: torch.device, noun: str) -> None:
    """Print the plan and warn of what will not fit; raises UsageError if the disk is too small."""
    available = available_memory(device)
    for line in plan.lines(noun=noun, save_dtype=options.save_dtype, available=available):
        print(line)
    warn_of_plan(plan, available)
    files = plan.disk_bytes(options.save_dtype)
    free = free_disk(options.save_dir)
    if not options.plan and files > free:
        raise UsageError(
            f"--save_dir {options.save_dir}: {human_size(free)} are free on that disk and the "
            f"run's files take {human_size(files)}; name a folder on a larger one"
        )


def settle_compile(options: Options, plan: TrainingPlan) -> Options:
    """The options of a pretraining with --compile auto decided by its plan; says what and why.

    Checkpoints keep the decision: compiled arithmetic rounds differently, and a resumed run has to
    go on bit for bit.
    """
    if options.compile == "on":
        print("compile      on: before the first step, which takes half a minute or more")
    if options.compile != "auto" or plan.device != "cpu":
        return options
    pays, reason = plan.compiling_pays(torch.get_num_threads())
    problem = compiler_problem(torch.device("cpu")) if pays else None
    if problem is not None:
        pays, reason = False, f"{reason}, but torch cannot compile here ({problem})"
    settled = "on" if pays else "off"
    print(f"compile      {settled}: {reason}")
    return dataclasses.replace(options, compile=settled)


def start(run: Run, checkpoint: dict[str, Any] | None) -> None:
    """Take over the checkpoint or clear the folder, and put on record what is about to run."""
    ranks = run.ranks
    if is_sharded(run.model):
        run.sharded = ShardedSave(ranks, run.options.dist_timeout)
    if checkpoint is not None:
        ranks.on_all(lambda: run.restore(checkpoint))
        if not goes_on(run.task, run.plan, run.progress):
            say_nothing_is_left(run)
    elif not ranks.is_main:
        seed_rank(run)

    def begin() -> None:
        if checkpoint is None and run.options.overwrite:
            run.folder.clear()
        run.folder.remove_abandoned()
        record = {
            "options": run.options.to_plain(),
            "environment": environment(),
            "device": describe_device(run.device),
            "dtype": dtype_name(run.dtype),
            "processes": ranks.world_size,
            "launch": ranks.launch,
            "resumed_at_step": run.progress.step,
        }
        run.folder.add_start(record)

    ranks.on_main(begin)
    if run.progress.first is None:
        run.progress.first = run.task.evaluate().get(run.task.goal)


def say_nothing_is_left(run: Run) -> None:
    """Of a resumed run that had ended: what would let it go on."""
    plan, flag = run.plan, "--epochs"
    if out_of_patience(run.task, plan, run.progress):
        flag = "--early_stopping"
    elif plan.last_step < plan.schedule_steps:
        flag = "--max_steps"
    print(
        f"nothing is left to train: the run ended after step {run.progress.step:,}; a larger "
        f"{flag} lets it go on. Its last files are made once more"
    )


def seed_rank(run: Run) -> None:
    """Give this rank dropout of its own: one of a number of ranks that no checkpoint tells of."""
    seed_everything(rank_seed(run.options.seed, run.progress.step, run.ranks.rank))


def share_batches(
    parts: Sequence[Sequence[int]], ranks: Ranks, make: Callable[[Sequence[int]], Batch]
) -> list[Batch]:
    """This rank's micro-batches of a window's, as many on every rank.

    A rank with one fewer than others gets one without targets: all take part in every pass.
    """
    return [
        make(parts[number]) if counts else make(parts[number][:1]).without_targets()
        for number, counts in ranks.rounds(len(parts))
    ]


# Flags that a resumed run looks at before it has read its checkpoint, or takes from it never.
ASKED_BEFORE_RESUMING = frozenset(
    "train dev test label_names dev_out test_out use_gpu max_steps cache_dir dist_timeout".split()
)


def interrupted(run: Run) -> int:
    """Say what was saved and how to go on; returns the exit status."""
    ranks = run.ranks
    words = ["python", sys.argv[0], "--option", run.options.option]
    if ranks.world_size > 1:
        words[:1] = ["torchrun", "--standalone", f"--nproc_per_node={ranks.world_size}"]
    words += ["--save_dir", str(run.folder.path), "--resume", "auto"]
    for name in sorted(run.options.given & ASKED_BEFORE_RESUMING):
        value = getattr(run.options, name)
        words += [f"--{name}", *([] if value is True else [str(value)])]
    command = f"go on with:\n  {quoted(*words)}"
    if ranks.nodes > 1:
        command = "started as before, with --resume auto, it goes on"
    print(f"stopped after step {run.progress.step:,}, and saved; {command}")
    return run.stop.exit_status


def quoted(*words: str | Path) -> str:
    """A command as it can be pasted into this system's shell."""
    plain = [str(word) for word in words]
    return subprocess.list2cmdline(plain) if os.name == "nt" else shlex.join(plain)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device; to a GPU from pinned memory, without waiting."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def ready_to_train(
    model: nn.Module, options: Options, device: torch.device, dtype: torch.dtype
) -> tuple[AdamW | MuonAndAdamW, torch.amp.GradScaler]:
    """The optimizer of the trainable parameters, and the gradient scaler that float16 needs."""
    weight_decay = options.weight_decay
    if weight_decay is None:
        weight_decay = 0.1 if options.option == "pretrain" else 0.0
    settings = {"lr": options.peak_lr(), "betas": BETAS, "eps": EPS}
    if options.optimizer == "muon":
        optimizer = MuonAndAdamW(model, weight_decay=weight_decay, **settings)
    else:
        optimizer = AdamW(parameter_groups(model, weight_decay), **settings)
    return optimizer, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


# ---------------------------------------------------------------------------- pretrain


@dataclass(frozen=True)
class Texts:
    """The text to train on and the held-out text, cut into chunks."""

    train: PretrainDataset
    val: PretrainDataset | None
    key: str  # of the training text, its vocabulary and how it was read
    locate: Callable[[int], str]  # where a training chunk stands in the files


SHOWN_FILES = 10  # of many, named one by one


TABLE_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
SAMPLED_TOKENS = 1 << 20  # looked at to see whether the vocabulary is one for the text
MOSTLY = 0.5  # of a text's bytes; English under an English vocabulary has next to none


def warn_of_vocabulary(share: float, files: list[Path]) -> None:
    """Say so where `share` of the text is spelt byte by byte, and how to train a vocabulary."""
    if share > MOSTLY:
        train = ["tokenizer.py", "train", "--input", *files[:SHOWN_FILES], "--vocab_size", "8000"]
        print(
            f"warning: {share:.0%} of the text is spelt byte by byte, for the vocabulary has no "
            "pieces for its characters: the model would learn slowly and see little at a time. "
            "Train a vocabulary on the text, then name it with --tokenizer_model my.model:\n"
            f"  {quoted('python', *train, '--output', 'my.model')}"
        )


def load_texts(options: Options, tokenizer: Tokenizer, stop: StopRequest, ranks: Ranks) -> Texts:
    """Tokenize the text, or find it tokenized, and hold some of it out. Raises UsageError."""
    reading = Reading(
        document_per_line=options.document_per_line,
        text_field=options.text_field,
        encoding_errors=options.encoding_errors,
        sentences_only=options.sentences_only,
    )

    def load(files: list[Path], flag: str) -> TokenCache:
        def build(should_stop: Callable[[], bool]) -> TokenCache:
            return build_or_load(
                files, tokenizer, reading, options.cache_dir, should_stop=should_stop
            )

        name = f"tokenizing {flag} {files[0]}"
        cache = ranks.first_on_node(name, build, stop, options.dist_timeout)
        if cache.rebuilt_because not in (None, "there was none"):
            print(f"tokenized anew: of the cache in {options.cache_dir}, {cache.rebuilt_because}")
        counted = []
        for path, chunks in zip(files, cache.chunks_per_file(length), strict=True):
            counted.append(f"Loaded {chunks} chunks from {path}")
            if is_labelled(path) and not options.sentences_only:
                counted.append("  labelled lines in it: --sentences_only reads the sentences alone")
            elif path.name.lower().endswith(TABLE_SUFFIXES):
                counted.append(
                    "  a table, read as plain text with all its separators: to train on one of its "
                    'columns make a .jsonl of it, a line {"text": ...} for each row'
                )
            elif not path.name.lower().endswith((*TEXT_SUFFIXES, *JSON_SUFFIXES)):
                counted.append("  read as plain text, marks and all")
        print("\n".join(counted[:SHOWN_FILES]))
        if len(counted) > SHOWN_FILES:
            print(f"... {len(files):,} files in all, {count_chunks(len(cache), length):,} chunks")
        return cache

    length = options.max_seq_len
    embedded = not options.pretrain_data
    patterns = options.pretrain_data or (str(DATA_DIR / "stories-train.jsonl"),)
    files = find_text_files(patterns, flag="--pretrain_data")
    cache = load(files, "--pretrain_data")
    warn_of_vocabulary(tokenizer.spelt_in_bytes(cache.tokens[:SAMPLED_TOKENS]), files)
    val_data = options.val_data
    if embedded and not val_data and options.val_fraction:
        val_data = (str(DATA_DIR / "stories-val.jsonl"),)
    if val_data:
        train = whole_stream(cache)
        val = whole_stream(load(find_text_files(val_data, flag="--val_data"), "--val_data"))
    else:
        train, val = split_documents(cache, options.val_fraction, chunk_length=length)
        if val is None and options.val_fraction:
            print("no validation: the text is too short to hold some of it out; --val_data FILE")
    if val is not None:
        share = len(val) / (len(val) + len(train))
        print(f"validation   {len(val):,} tokens held out ({share:.1%} of all)")

    def locate(chunk: int) -> str:
        file, token = cache.place(train.locate(chunk * length))
        text = tokenizer.decode(train.read(chunk * length, chunk * length + 8)[:8].tolist())
        return f"{files[file]}, token {token:,} ({text!r})"

    if len(train) <= length:
        print(f"the text is shorter than --max_seq_len {length}: training on one short chunk")
    return Texts(
        PretrainDataset(train, length),
        None if val is None else PretrainDataset(val, length),
        cache.key.hex()[:16],
        locate,
    )


def pretrain(options: Options, stop: StopRequest) -> int:
    """Train a Llama from scratch on text files; returns the exit status."""
    if options.plan and options.world_size:
        return plan_elsewhere(options, stop)
    options = where_it_was(options)
    with own_folder(options, "pretrain") as folder:
        return pretrain_in(folder, options, stop)


def pretrain_in(folder: RunFolder, options: Options, stop: StopRequest) -> int:
    """`pretrain` in a folder that no other run writes to."""
    ranks = Ranks.from_environment()
    options, checkpoint = open_run(options, folder, ranks)
    tokenizer = Tokenizer(tokenizer_model=options.tokenizer_model)
    config = options.llama_config(tokenizer.n_words)
    seed_everything(options.seed)
    device, device_note = choose_device(options.use_gpu, ranks)
    dtype = choose_dtype(options.dtype, device)
    if options.compile == "on":
        check_compiler(device)
    print(f"device       {device_note}{ranks.note(options.parallel)}")
    texts = load_texts(options, tokenizer, stop, ranks)
    identity = {
        "--pretrain_data, --tokenizer_model or how the text is read: key": texts.key,
        "training tokens (--val_fraction, --val_data)": len(texts.train.stream),
        "model shape": config.to_model_args() | {"dropout": 0.0},
        "--max_seq_len": options.max_seq_len,
        GLOBAL_BATCH: options.global_batch_size,
        "--seed": options.seed,
        "--optimizer": options.optimizer,
    }
    if checkpoint is not None:
        check_identity(checkpoint, identity)
    plan = make_plan(
        options,
        ranks,
        device,
        dtype,
        config=config,
        trainable_parameters=sum(config.parameter_counts().values()),
        muon_parameters=options.muon_parameters(config),
        sequences=len(texts.train),
        tokens=len(texts.train.stream),
        sequence_length=options.max_seq_len,
        logits_width=config.vocab_size,
    )
    ranks.on_main(lambda: print_plan(options, plan, device, "chunks"))
    options = settle_compile(options, plan)
    if options.plan:
        return 0

    keep_freed_memory()
    model = Llama(config)
    model.vocabulary = tokenizer.model_bytes
    model.activation_checkpointing = options.activation_checkpointing
    next_token_loss = NextTokenLoss(model)
    eager = distribute(
        next_token_loss,
        model.layers,
        ranks=ranks,
        parallel=options.parallel,
        device=device,
        dtype=dtype,
    )
    optimizer, scaler = ready_to_train(model, options, device, dtype)
    compiled = torch.compile(eager, dynamic=False) if options.compile == "on" else eager

    def loss(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # An epoch's short last batch is not worth another half minute of compiling.
        whole = tokens.shape == (options.pretrain_batch_size, options.max_seq_len)
        return (compiled if whole else eager)(tokens, targets)[0]

    def batches(step: int) -> list[Batch]:
        epoch, index = divmod(step, plan.steps_per_epoch)
        chosen = batch_indices(
            len(texts.train), plan.sequences_per_step, options.seed, epoch, index
        )
        size = options.pretrain_batch_size
        parts = [chosen[i : i + size] for i in range(0, len(chosen), size)]
        return share_batches(parts, ranks, lambda part: text_batch(texts.train, part, device))

    def evaluate() -> dict[str, float]:
        if texts.val is None:
            return {}
        return evaluate_text(next_token_loss, texts.val, options, device, dtype, stop, ranks)

    task = Task(
        batches=batches,
        loss=loss,
        evaluate=evaluate,
        goal="loss" if texts.val is None else "val_loss",
        higher_is_better=False,
        weights=lambda: model_payload(
            model, getattr(torch, options.save_dtype), state=whole_state(model, ranks)
        ),
        state=lambda state: model_payload(model, state=state),
        locate=texts.locate,
        best_interval=options.best_model_interval,
        eval_interval=options.eval_interval,
    )
    run = Run(
        options, plan, task, model, eager, optimizer, scaler, device, dtype, folder, ranks, stop,
        identity,
    )  # fmt: skip
    start(run, checkpoint)
    if train(run):
        return interrupted(run)
    return finish_pretraining(run, tokenizer)


def plan_elsewhere(options: Options, stop: StopRequest) -> int:
    """Print what a run would need and take on `--world_size` GPUs of machines like those described.

    The vocabulary and the text are read only where their sizes are not given.
    """
    tokenizer = None
    ranks = Ranks(world_size=options.world_size)
    options = options.with_global_batch(ranks.world_size)
    if not (options.vocab_size and options.plan_tokens):
        tokenizer = Tokenizer(tokenizer_model=options.tokenizer_model)
    config = options.llama_config(options.vocab_size or tokenizer.n_words)
    tokens = int(
        options.plan_tokens or len(load_texts(options, tokenizer, stop, Ranks()).train.stream)
    )
    plan = make_plan(
        options,
        ranks,
        torch.device("cuda"),
        torch.bfloat16 if options.dtype == "auto" else getattr(torch, options.dtype),
        config=config,
        trainable_parameters=sum(config.parameter_counts().values()),
        muon_parameters=options.muon_parameters(config),
        sequences=count_chunks(tokens, options.max_seq_len),
        tokens=tokens,
        sequence_length=options.max_seq_len,
        logits_width=config.vocab_size,
    )
    memory = int(options.gpu_memory_gb * 1e9)
    lines = plan.lines(noun="chunks", save_dtype=options.save_dtype, available=memory)
    print("\n".join([*lines, *options.cluster().lines(plan)]))
    warn_of_plan(plan, memory)
    return 0


def text_batch(dataset: PretrainDataset, indices: Sequence[int], device: torch.device) -> Batch:
    """Chunks as a micro-batch on the device."""
    tokens, targets = dataset.batch(indices)
    real = int((targets != IGNORE_INDEX).sum())
    inputs = (to_device(tokens, device), to_device(targets, device))
    return Batch(inputs, targets=real, tokens=real, numbers=indices)


def evaluate_text(
    next_token_loss: NextTokenLoss,
    dataset: PretrainDataset,
    options: Options,
    device: torch.device,
    dtype: torch.dtype,
    stop: StopRequest,
    ranks: Ranks,
) -> dict[str, float]:
    """Loss in nats per token, perplexity and bits per byte over all of `dataset`.

    The ranks share the batches and add up their losses in the batches' order, so the sum does not
    depend on how many they are. Raises Interrupted when asked to stop.
    """
    size = options.pretrain_batch_size
    losses = np.zeros(-(-len(dataset) // size))
    next_token_loss.eval()
    try:
        with no_gradients(next_token_loss), autocast(device, dtype):
            rounds = list(ranks.rounds(len(losses)))
            for number, counts in tqdm(rounds, desc="validating", leave=False, disable=None):
                ranks.check_stop(stop)
                indices = range(number * size, min((number + 1) * size, len(dataset)))
                batch = text_batch(dataset, indices, device)
                losses[number] = counts * next_token_loss(*batch.inputs)[0].item()
    finally:
        next_token_loss.train()
    loss_sum = sum(ranks.sum_array(losses).tolist())
    metrics = {"val_loss": loss_sum / dataset.n_targets}
    metrics["val_perplexity"] = math.exp(min(metrics["val_loss"], 700.0))
    if dataset.stream.utf8_bytes:
        metrics["bits_per_byte"] = loss_sum / math.log(2) / dataset.stream.utf8_bytes
    return metrics


def finish_pretraining(run: Run, tokenizer: Tokenizer) -> int:
    """Write the model and the loss curve, show a sample, and say what there is and what is next."""
    folder, progress = run.folder, run.progress
    final, curve = folder.file("final-model.pt"), folder.file("loss-curve.svg")
    write_weights(run, "final-model.pt")
    every_nth = max(1, progress.step // CURVE_POINTS)
    records = [
        record
        for record in read_records(folder.file("metrics.jsonl"))
        if record["step"] % every_nth == 0 or record.get("val_loss") is not None
    ]
    picture = loss_curve_svg(records, f"{folder.path}")

    def draw() -> None:
        run.ranks.on_main(lambda: write_text(curve, picture))

    run.files.write(curve.name, draw, step=progress.step)
    run.files.finish()
    if not run.ranks.is_main:
        return 0
    model = load_pretrained(final) if is_sharded(run.model) else run.model.eval()
    print("\na sample of what it writes:")
    print(sample_text(model, tokenizer))
    print()
    last = records[-1] if records else {}
    if last.get("val_perplexity") is not None and progress.first is not None:
        print(
            f"validation perplexity {math.exp(progress.first):,.1f} before training, "
            f"{last['val_perplexity']:.2f} after {progress.step:,} steps"
        )
    list_files(folder)
    print_next(final, "One day", "generate", "finetune")
    return 0


def print_next(model: Path, prompt: str, *options: str) -> None:
    """Print the commands that a new model is for."""
    print("next:")
    for option in options:
        words = ["python", sys.argv[0], "--option", option, "--pretrained_model_path", model]
        print(" ", quoted(*words, *(["--prompt", prompt] if option == "generate" else [])))
    print(" ", quoted("python", Path(sys.argv[0]).with_name("check_model_precision.py"), model))


def list_files(folder: RunFolder) -> None:
    """Print the run's files and their sizes."""
    print("files:")
    for path in folder.own_files():
        print(f"  {human_size(size_on_disk(path)):>8}  {path}")


def sample_text(model: Llama, tokenizer: Tokenizer, max_new_tokens: int = 120) -> str:
    """A document begun from nothing, at temperature 0.8."""
    ids = [tokenizer.bos_id]
    for (token,) in generate_tokens(
        model,
        [ids[:]],
        max_new_tokens=min(max_new_tokens, model.config.max_seq_len - 1),
        sampling=Sampling(temperature=0.8),
        seeds=[0],
        stop_ids=[tokenizer.eos_id],
    ):
        if token is not None:
            ids.append(token)
    return tokenizer.decode(ids)


# ---------------------------------------------------------------------------- a pretrained model


def find_model(options: Options) -> Path:
    """The model file or folder to use, as named or the first default that is there; says which.

    Of a run's folder that is its model. Raises UsageError where it has several, or none.
    """
    path = options.pretrained_model_path
    if path is not None:
        of_a_run = path.is_dir() and not (path / "config.json").is_file()  # not Hugging Face's
        files = sorted(path.glob("*.pt")) if of_a_run else []
        return model_of_run(path, files) if files else path
    defaults = (Path("checkpoints/final-model.pt"), Path("stories42M.pt"), SHIPPED_MODEL)
    path = next((path for path in defaults if path.exists()), SHIPPED_MODEL)
    print(f"--pretrained_model_path is not given: using {path}")
    return path


def model_of_run(folder: Path, files: list[Path]) -> Path:
    """The final model among a run folder's .pt files, else the only best one; says which."""
    final = [path for path in files if path.name == "final-model.pt"]
    best = [path for path in files if path.name.endswith("best-model.pt")]
    found = final or best
    if len(found) != 1:
        named = ", ".join(str(path) for path in (best or files)[:SHOWN_FILES])
        raise UsageError(f"--pretrained_model_path {folder}: is a folder; name one of {named}")
    print(f"--pretrained_model_path {folder} is a folder: using {found[0]}")
    return found[0]


def find_vocabulary(llama: Llama, path: Path, options: Options) -> Tokenizer:
    """The vocabulary of a loaded model: its own; files without one take a file of the same size.

    Raises UsageError, naming both fingerprints or sizes, for a vocabulary that is not the model's.
    """
    given = options.tokenizer_model
    if llama.vocabulary is not None:
        tokenizer = Tokenizer(tokenizer_model=llama.vocabulary)
        if given is not None:
            named = Tokenizer(tokenizer_model=given)
            if named.fingerprint != tokenizer.fingerprint:
                raise UsageError(
                    f"--tokenizer_model {given} has the fingerprint {named.fingerprint}, and "
                    f"{path} was trained with {tokenizer.fingerprint}: leave the flag out"
                )
        if tokenizer.n_words != llama.config.vocab_size:
            raise UsageError(
                f"{path}: the vocabulary in it has {tokenizer.n_words:,} pieces and the model "
                f"{llama.config.vocab_size:,}: they do not belong together; make the file anew"
            )
        return tokenizer
    beside = Path("tokenizer.model")
    if given is None and not beside.exists():
        raise UsageError(
            f"{path} carries no vocabulary: {vocabulary_remedy(llama.config.vocab_size)}"
        )
    tokenizer = Tokenizer(tokenizer_model=given or beside)
    if tokenizer.n_words != llama.config.vocab_size:
        raise UsageError(
            f"--tokenizer_model {given or beside} has {tokenizer.n_words:,} pieces (fingerprint "
            f"{tokenizer.fingerprint}) and {path} was trained with "
            f"{llama.config.vocab_size:,}: name the vocabulary it was trained with"
        )
    return tokenizer


def load_model(
    options: Options, ranks: Ranks | None = None
) -> tuple[Llama, Tokenizer, torch.device]:
    """The model on its device, in float32 and eval mode, and its vocabulary."""
    path = find_model(options)
    llama = load_pretrained(path)
    tokenizer = find_vocabulary(llama, path, options)
    llama.vocabulary = tokenizer.model_bytes
    ranks = ranks or Ranks()
    device, note = choose_device(options.use_gpu, ranks)
    print(f"device       {note}{ranks.note(options.parallel)}")
    return llama.to(device), tokenizer, device


# ---------------------------------------------------------------------------- labelled data


@dataclass(frozen=True)
class LabelledFiles:
    """The files of a labelled data set, its name, its labels' names and where predictions go."""

    name: str
    label_names: list[str]
    train: Path
    dev: Path
    test: Path | None
    dev_out: Path
    test_out: Path


def find_labelled_files(options: Options, suffix: str) -> LabelledFiles:
    """The files that the flags name, else the embedded reviews; checked before any long work.

    `suffix` ends the default names of the prediction files, as the assignment has them: its
    `sst-dev-finetuning-output.txt`. Raises UsageError.
    """
    train = options.train or DATA_DIR / "reviews-train.txt"
    name = re.sub(r"[-_.]?train$", "", train.stem) or train.stem
    dev = options.dev if options.train else DATA_DIR / "reviews-dev.txt"
    test = options.test if options.train else DATA_DIR / "reviews-test.txt"
    if dev is None:
        raise UsageError(f"--dev is not given: --train {train} needs a file to be measured on")
    for flag, path in (("--train", train), ("--dev", dev), ("--test", test)):
        if path is not None:
            find_text_files([path], flag=flag)
    out = [
        options.dev_out or Path(f"{name}-dev-{suffix}-output.txt"),
        options.test_out or Path(f"{name}-test-{suffix}-output.txt"),
    ]
    taken = {path.resolve() for path in (train, dev, test) if path is not None}
    for flag, path in zip(("--dev_out", "--test_out"), out, strict=True):
        if path.resolve() in taken:
            raise UsageError(f"{flag} {path}: is another of the files named; give a new one")
        taken.add(path.resolve())
        check_writable_file(path, flag)
    names = read_label_names(options.label_names, train.with_name(f"{name}-label-mapping.json"))
    labels = {example.label for example in read_labelled(train, n_labels=len(names) or None)}
    if None in labels:
        raise UsageError(f"--train {train}: has lines without a label, which cannot be learnt from")
    if names and len(labels) != len(names):
        raise UsageError(
            f"--label_names names {len(names)} labels and --train {train} has {len(labels)} "
            f"({', '.join(map(str, sorted(labels)))}): give names and lines for the same labels"
        )
    names = names or [str(label) for label in range(max(labels) + 1)]
    return LabelledFiles(name, names, train, dev, test, *out)


def read_label_names(given: Path | None, beside: Path) -> list[str]:
    """The JSON list of label names, as given or beside the training file; else an empty list."""
    if given is None and not beside.is_file():
        return []
    if given is not None and given.is_dir():
        raise UsageError(f"--label_names {given}: is a folder; name the JSON file")
    path = find_text_files([given or beside], flag="--label_names")[0]
    try:
        names = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UsageError(f"--label_names {path}: is not JSON ({error})") from None
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(n, str) for n in names):
        raise UsageError(f'--label_names {path}: must be a JSON list of names, ["bad", "good"]')
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise UsageError(f"--label_names {path}: {twice[0]!r} stands there more than once")
    return names


@dataclass(frozen=True)
class Scores:
    """How predictions compare with labels. `confusion[label][prediction]` counts sentences."""

    confusion: np.ndarray  # (n_labels, n_labels) int64

    @classmethod
    def of(cls, labels: Sequence[int | None], predictions: Sequence[int], n: int) -> Scores:
        """Count the pairs; sentences without a label are left out."""
        confusion = np.zeros((n, n), np.int64)
        for label, prediction in zip(labels, predictions, strict=True):
            if label is not None:
                confusion[label, prediction] += 1
        return cls(confusion)

    @property
    def accuracy(self) -> float:
        """Share of sentences whose label was predicted."""
        return float(np.trace(self.confusion) / max(1, self.confusion.sum()))

    @property
    def majority(self) -> float:
        """Accuracy of always predicting the most frequent label."""
        return float(self.confusion.sum(axis=1).max() / max(1, self.confusion.sum()))

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the labels that occur, in truth or in predictions."""
        hits = np.diag(self.confusion)
        seen = self.confusion.sum(axis=0) + self.confusion.sum(axis=1)
        return float(np.mean(2 * hits[seen > 0] / seen[seen > 0])) if seen.any() else 0.0

    def lines(self, names: Sequence[str]) -> list[str]:
        """The confusion matrix as a table: a row per label, a column per prediction."""
        width = max(7, *(len(name) + 2 for name in names))
        head = "label \\ predicted".ljust(18) + "".join(name.rjust(width) for name in names)
        rows = [
            name.ljust(18) + "".join(str(count).rjust(width) for count in row)
            for name, row in zip(names, self.confusion, strict=True)
        ]
        return [head, *rows]


def report_predictions(
    split: str, dataset: LlamaDataset, predictions: list[int], names: list[str], out: Path
) -> None:
    """Print a split's figures, or that it has none, and write `prediction ||| sentence` lines."""
    if dataset.is_unlabelled():
        print(f"{split}: unlabelled ({len(dataset)} sentences), so no accuracy")
    elif split == "test" and dataset.has_placeholder_labels():
        print(f"{split}: unlabelled (one and the same label on every line), so no accuracy")
    else:
        scores = Scores.of(dataset.labels, predictions, len(names))
        print(
            f"{split} accuracy {scores.accuracy:.3f}, macro-F1 {scores.macro_f1:.3f} "
            f"({scores.confusion.sum()} labelled; always the commonest label: "
            f"{scores.majority:.3f})"
        )
        print("\n".join("  " + line for line in scores.lines(names)))
    lines = [
        f"{prediction} ||| {example.sentence}\n"
        for prediction, example in zip(predictions, dataset.examples, strict=True)
    ]
    write_text(out, "".join(lines))
    print(f"wrote {out}")


# ---------------------------------------------------------------------------- finetune


def finetune(options: Options, stop: StopRequest) -> int:
    """Train a classifier on top of a pretrained Llama; returns the exit status."""
    options = where_it_was(options)
    files = find_labelled_files(options, "finetuning")
    with own_folder(options, f"finetune-{files.name}") as folder:
        return finetune_in(folder, files, options, stop)


def finetune_in(
    folder: RunFolder, files: LabelledFiles, options: Options, stop: StopRequest
) -> int:
    """`finetune` in a folder that no other run writes to."""
    ranks = Ranks.from_environment()
    options, checkpoint = open_run(options, folder, ranks)
    seed_everything(options.seed)
    keep_freed_memory()
    llama, tokenizer, device = load_model(options, ranks)
    dtype = choose_dtype(options.dtype, device)
    if options.compile == "on":
        check_compiler(device)
    room = min(options.max_sentence_len or math.inf, llama.config.max_seq_len - 1)
    splits = {
        split: LlamaDataset(
            path, tokenizer, n_labels=len(files.label_names), max_sentence_len=int(room)
        )
        for split, path in (("train", files.train), ("dev", files.dev), ("test", files.test))
        if path is not None
    }
    for split, dataset in splits.items():
        cut = f", {dataset.cut} of them cut to {int(room)} tokens" if dataset.cut else ""
        print(f"Loaded {len(dataset)} sentences from {dataset.path} ({split}){cut}")
    train_set, dev_set = splits["train"], splits["dev"]

    if options.lora_rank:
        add_lora(llama, rank=options.lora_rank, alpha=2 * options.lora_rank)
    llama.activation_checkpointing = options.activation_checkpointing
    model = LlamaEmbeddingClassifier(
        llama,
        num_labels=len(files.label_names),
        hidden_dropout_prob=options.hidden_dropout_prob,
        freeze_backbone=options.freeze_backbone,
    ).to(device)
    identity = {
        "--train": hashlib.sha256(files.train.read_bytes()).hexdigest()[:16],
        "model shape": llama.config.to_model_args(),
        "--tokenizer_model": tokenizer.fingerprint,
        GLOBAL_BATCH: options.global_batch_size,
        "--max_sentence_len": options.max_sentence_len,
        "--freeze_backbone": options.freeze_backbone,
        "--lora_rank": options.lora_rank,
        "--seed": options.seed,
        "--optimizer": options.optimizer,
    }
    if checkpoint is not None:
        check_identity(checkpoint, identity)
    muon = options.optimizer == "muon"
    plan = make_plan(
        options,
        ranks,
        device,
        dtype,
        config=llama.config,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        muon_parameters=muon * sum(p.numel() for p in layer_matrices(model)),
        sequences=len(train_set),
        tokens=int(train_set.lengths.sum()),
        sequence_length=int(train_set.lengths.max()),
        logits_width=len(files.label_names),
    )
    ranks.on_main(lambda: print_plan(options, plan, device, "sentences"))
    if options.plan:
        return 0

    # Sharded in float32, which predictions are made in; training's dtype is autocast's.
    parallel = distribute(
        model,
        llama.layers,
        ranks=ranks,
        parallel=options.parallel,
        device=device,
        dtype=torch.float32,
    )
    optimizer, scaler = ready_to_train(model, options, device, dtype)
    classify = torch.compile(parallel, dynamic=True) if options.compile == "on" else parallel

    @functools.lru_cache(maxsize=1)
    def epoch_batches(epoch: int) -> list[np.ndarray]:
        size = options.global_batch_size
        return bucketed_batches(train_set.lengths, size, options.seed, epoch)

    def batches(step: int) -> list[Batch]:
        epoch, index = divmod(step, plan.steps_per_epoch)
        batch = epoch_batches(epoch)[index]
        parts = np.split(batch, range(options.batch_size, len(batch), options.batch_size))
        return share_batches(parts, ranks, lambda part: labelled_batch(train_set, part, device))

    def loss(tokens: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.nll_loss(classify(tokens, lengths), labels, reduction="sum")

    def evaluate() -> dict[str, float]:
        if dev_set.is_unlabelled():
            return {}
        predictions = predict(model, dev_set, options.batch_size, device, stop, ranks)
        scores = Scores.of(dev_set.labels, predictions, len(files.label_names))
        return {"dev_accuracy": scores.accuracy, "dev_f1": scores.macro_f1}

    task = Task(
        batches=batches,
        loss=loss,
        evaluate=evaluate,
        goal="loss" if dev_set.is_unlabelled() else "dev_accuracy",
        higher_is_better=not dev_set.is_unlabelled(),
        weights=lambda: classifier_payload(model, files.label_names, options, ranks),
        state=lambda state: model_payload(llama, state=state),
        locate=lambda number: f"{files.train}, sentence {number + 1:,}",
        patience=options.early_stopping,
    )
    run = Run(
        options, plan, task, model, parallel, optimizer, scaler, device, dtype, folder, ranks, stop,
        identity,
    )  # fmt: skip
    start(run, checkpoint)
    if train(run):
        return interrupted(run)
    run.files.finish()
    best = folder.file("best-model.pt")
    load_classifier(model, best, options)
    epoch = run.progress.best_step / plan.steps_per_epoch
    print(f"\nbest model: {best}, after step {run.progress.best_step:,} (epoch {epoch:.3g})")
    try:
        for split, out in (("dev", files.dev_out), ("test", files.test_out)):
            if split in splits:
                predictions = predict(model, splits[split], options.batch_size, device, stop, ranks)
                report = functools.partial(
                    report_predictions, split, splits[split], predictions, files.label_names, out
                )
                ranks.on_main(report)
    except Interrupted:
        return interrupted(run)
    list_files(folder)
    print_next(best, "This film", "generate")
    return 0


def labelled_batch(dataset: LlamaDataset, indices: Sequence[int], device: torch.device) -> Batch:
    """Labelled sentences as a micro-batch on the device."""
    batch = dataset.collate(indices)
    inputs = (batch.tokens, batch.lengths, batch.labels)
    return Batch(
        tuple(to_device(tensor, device) for tensor in inputs),
        targets=len(indices),
        tokens=int(batch.lengths.sum()),
        numbers=indices,
    )


def predict(
    model: LlamaEmbeddingClassifier,
    dataset: LlamaDataset,
    batch_size: int,
    device: torch.device,
    stop: StopRequest,
    ranks: Ranks,
) -> list[int]:
    """The likeliest label of each sentence, in the file's order.

    In float32 whatever the training's dtype: bfloat16 rounds differently at another batch size,
    and a prediction must not depend on its batch. Raises Interrupted when asked to stop.
    """
    predictions = np.zeros(len(dataset), np.int64)
    was_training = model.training
    model.eval()
    with no_gradients(model):
        batches = dataset.length_sorted_batches(batch_size)
        rounds = list(ranks.rounds(len(batches)))
        for number, counts in tqdm(rounds, desc="predicting", leave=False, disable=None):
            ranks.check_stop(stop)
            batch = labelled_batch(dataset, batches[number], device)
            found = model(*batch.inputs[:2]).argmax(dim=-1).cpu().numpy()
            predictions[batches[number]] = counts * found
    model.train(was_training)
    return ranks.sum_array(predictions).tolist()


def classifier_payload(
    model: LlamaEmbeddingClassifier, label_names: list[str], options: Options, ranks: Ranks
) -> dict[str, Any]:
    """An ordinary weights file, adapters folded in, with the classifier's head beside the model."""
    llama = model.llama
    if options.lora_rank:
        llama = copy.deepcopy(llama)
        merge_lora(llama)
    dtype = getattr(torch, options.save_dtype)
    head = whole_state(model.classifier_head, ranks)
    return model_payload(llama, dtype, state=whole_state(llama, ranks)) | {
        "classifier_head": {name: tensor.cpu() for name, tensor in head.items()},
        "label_names": label_names,
    }


def load_classifier(model: LlamaEmbeddingClassifier, path: Path, options: Options) -> None:
    """Put the weights of `classifier_payload` back into the classifier."""
    payload = load_checkpoint(path)
    if options.lora_rank:
        merge_lora(model.llama)
    load_whole_state(model.llama, payload["model"])
    load_whole_state(model.classifier_head, payload["classifier_head"])


# ---------------------------------------------------------------------------- prompt


@dataclass(frozen=True)
class Prompts:
    """Turns a sentence into the token ids of prompt and label, one sequence per label."""

    tokenizer: Tokenizer
    template: str
    label_names: list[str]
    context: int  # tokens that prompt and label may have together
    max_sentence_len: int | None = None
    shots: str = ""  # solved examples that stand before the prompt
    cut: set[str] = dataclasses.field(default_factory=set)  # sentences that did not fit

    def text(self, sentence: str) -> str:
        """The prompt without shots: the template filled in."""
        names = self.label_names
        labels = (
            " or ".join(names) if len(names) == 2 else f"{', '.join(names[:-1])}, or {names[-1]}"
        )
        filled = self.template.replace("{labels}", labels)
        return filled.replace("{sentence}", sentence).strip()

    def sequences(self, sentence: str) -> tuple[list[list[int]], int]:
        """Each label's ids after the prompt, tokenized jointly, and where the labels begin.

        The sentence is cut until all fits into the context; the question never is. Raises
        UsageError where the question alone does not fit.
        """
        ids = self.tokenizer.encode(sentence, bos=False, eos=False)
        kept = min(len(ids), self.max_sentence_len or len(ids))
        while True:
            cut = sentence if kept == len(ids) else self.tokenizer.decode(ids[:kept])
            prompt = self.shots + self.text(cut)
            texts = [prompt, *(f"{prompt} {name}" for name in self.label_names)]
            encoded = [self.tokenizer.encode(text, bos=True, eos=False) for text in texts]
            over = max(map(len, encoded)) - self.context
            if over <= 0:
                if kept < len(ids):
                    self.cut.add(sentence)
                return encoded[1:], common_prefix(encoded)
            kept -= over
            if kept < min(1, len(ids)):
                raise UsageError(
                    f"--prompt_template and --shots take more than the model's context of "
                    f"{self.context} tokens without a sentence: shorten them"
                )


def prompt(options: Options, stop: StopRequest) -> int:
    """Classify sentences by the label that the model finds likeliest after a question."""
    files = find_labelled_files(options, "prompting")
    examples = read_labelled(files.train) if options.shots else []
    if options.shots > len(examples):
        raise UsageError(
            f"--shots {options.shots}: --train {files.train} has {len(examples)} examples to show"
        )
    llama, tokenizer, device = load_model(options)
    model = LlamaZeroShotClassifier(llama)
    datasets = {
        split: LlamaDataset(path, tokenizer, n_labels=len(files.label_names))
        for split, path in (("dev", files.dev), ("test", files.test))
        if path is not None
    }
    prompts = Prompts(
        tokenizer,
        options.prompt_template.replace("\\n", "\n"),
        files.label_names,
        llama.config.max_seq_len,
        options.max_sentence_len,
    )
    if options.shots:
        chosen = random.Random(options.seed).sample(examples, options.shots)
        solved = [
            f"{prompts.text(example.sentence)} {files.label_names[example.label]}\n"
            for example in chosen
        ]
        prompts = dataclasses.replace(prompts, shots="".join(solved))
    # Without any sentence: what `pmi` subtracts; and a question that is too long shows at once.
    base = score_labels(model, prompts, [""], "sum")
    for split, out in (("dev", files.dev_out), ("test", files.test_out)):
        if split not in datasets:
            continue
        dataset = datasets[split]
        predictions = np.zeros(len(dataset), np.int64)
        batches = dataset.length_sorted_batches(options.batch_size)
        for indices in tqdm(batches, desc=f"prompting {split}", dynamic_ncols=True):
            stop.check()
            sentences = [dataset.examples[index].sentence for index in indices]
            scores = score_labels(model, prompts, sentences, options.label_norm)
            if options.label_norm == "pmi":
                scores = scores - base
            predictions[indices] = scores.argmax(dim=-1).cpu().numpy()
        cut = sum(example.sentence in prompts.cut for example in dataset.examples)
        if cut:
            print(f"{split}: {cut} of {len(dataset)} sentences were cut to fit with the question")
        report_predictions(split, dataset, predictions.tolist(), files.label_names, out)
    return 0


def score_labels(
    model: LlamaZeroShotClassifier, prompts: Prompts, sentences: Sequence[str], norm: str
) -> torch.Tensor:
    """Scores (B, n_labels): log-probabilities of the labels, per `norm`: sum, token or byte."""
    sequences, starts = zip(*(prompts.sequences(sentence) for sentence in sentences), strict=True)
    scores, counts = model.score(sequences, starts)
    if norm == "token":
        return scores / counts.to(scores.device)
    if norm == "byte":
        sizes = [len(f" {name}".encode()) for name in prompts.label_names]
        return scores / torch.tensor(sizes, device=scores.device)
    return scores


# ---------------------------------------------------------------------------- generate

# The assignment's test sentence, continued when no prompt is given.
PREFIX = (
    "I have wanted to see this thriller for a while, and it didn't disappoint. Keanu Reeves, "
    "playing the hero John Wick, is"
)
PROMPT_TEMPERATURE = 0.8  # where --prompt is given and --temperature is not


def generate(options: Options, stop: StopRequest) -> int:
    """Continue prompts; without any, the assignment's sentence at temperature 0 and 1."""
    prompts = list(options.prompt)
    if options.prompt_file is not None:
        path = find_text_files([options.prompt_file], flag="--prompt_file")[0]
        prompts += [line for _, line in TextSource(path).lines() if line.strip()]
        if not prompts:
            raise UsageError(f"--prompt_file {path}: is empty; it takes a prompt a line")
    outputs = []
    if not prompts and not options.interactive and options.temperature is None:
        outputs = [
            (0.0, options.generated_sentence_low_temp_out),
            (1.0, options.generated_sentence_high_temp_out),
        ]
        flags = ("--generated_sentence_low_temp_out", "--generated_sentence_high_temp_out")
        for flag, (_, path) in zip(flags, outputs, strict=True):
            check_writable_file(path, flag)
    if options.compile == "on":
        check_compiler(choose_device(options.use_gpu)[0])
    llama, tokenizer, device = load_model(options)
    if device.type == "cpu" or options.weights != "float32":
        llama.lay_out_for_decoding(getattr(torch, options.weights))
    step = compile_step() if options.compile == "on" else None
    writer = Writer(llama, tokenizer, options, stop, step)
    for temperature, path in outputs:
        print(f"Temperature is {temperature:g}")
        texts = writer.continue_texts([PREFIX], temperature)
        print("---------------")
        stop.check()
        write_text(path, "\n\n".join(texts))
        print(f"Wrote generated sentence to {path}.")
    if options.interactive:
        return converse(writer, options)
    if not outputs:
        temperature = PROMPT_TEMPERATURE if options.temperature is None else options.temperature
        writer.continue_texts(prompts or [PREFIX], temperature)
    return stop.exit_status if stop.requested else 0


def converse(writer: Writer, options: Options) -> int:
    """Read prompts from the terminal and continue each, until the end of input or Ctrl-C."""
    writer.stop.restore()  # Ctrl-C at a prompt should end the program at once
    temperature = PROMPT_TEMPERATURE if options.temperature is None else options.temperature
    while True:
        try:
            text = input("> ").encode("utf-8", "replace").decode("utf-8")  # bytes that are none
        except EOFError:
            print()
            return 0
        writer.continue_texts([text], temperature)


class Continuation:
    """The text that grows behind a prompt; holds back what may yet turn into something else."""

    def __init__(self, prompt_ids: list[int], tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.prompt_ids, self.tokenizer, self.stops = prompt_ids, tokenizer, stops
        self.ids: list[int] = []
        self.prompt_text = tokenizer.decode(prompt_ids)
        self.text = ""  # without the prompt, certain
        self.ended = False

    def add(self, token: int | None) -> str:
        """Take the next token (None: the row has ended); returns the text that became certain."""
        if token is None:
            self.ended = True
        elif not self.ended:
            self.ids.append(token)
        text = self.tokenizer.decode(self.prompt_ids + self.ids)[len(self.prompt_text) :]
        found = [place for place in map(text.find, self.stops) if place >= 0]
        if found:
            self.ended, text = True, text[: min(found)]
        elif not self.ended:  # a character of several bytes, or the beginning of a stop text
            text = text.rstrip("\ufffd")
            held = max((overlap(text, stop) for stop in self.stops), default=0)
            text = text[: len(text) - held]
        new, self.text = text[len(self.text) :], text
        return new


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class Writer:
    """Continues texts with a model and shows them: one as it comes, several when they are whole."""

    llama: Llama
    tokenizer: Tokenizer
    options: Options
    stop: StopRequest
    step: Callable[..., torch.Tensor] | None = None  # compiled, to read single tokens with

    def continue_texts(self, prompts: Sequence[str], temperature: float) -> list[str]:
        """Prompt and continuation of each prompt, `--num_samples` times."""
        options, samples = self.options, self.options.num_samples
        rows = [
            Continuation(self.tokenizer.encode(text, True, False), self.tokenizer, options.stop)
            for text in prompts
            for _ in range(samples)
        ]
        context = self.llama.config.max_seq_len
        longest = max(len(row.prompt_ids) for row in rows)
        if longest > context:
            print(
                f"note: a prompt has {longest:,} tokens and the model's context is {context:,}: it "
                "goes on from the last ones that fit"
            )
        generate_steps = functools.partial(
            generate_tokens,
            self.llama,
            [row.prompt_ids for row in rows],
            max_new_tokens=options.max_new_tokens,
            step=self.step,
        )
        if self.step is not None:  # compile now, rather than while the text is being shown
            started = time.perf_counter()
            for _ in itertools.islice(generate_steps(sampling=Sampling(temperature=0)), 2):
                self.stop.check()
            seconds = time.perf_counter() - started
            if seconds >= 1:  # else these shapes were compiled before
                print(f"compile      took {human_time(seconds)}")
        streamed = len(rows) == 1
        if streamed:
            print(prompts[0], end="", flush=True)
        steps = generate_steps(
            sampling=Sampling(
                temperature,
                options.top_k,
                options.top_p,
                options.min_p,
                options.repetition_penalty,
            ),
            # A sample's number alone seeds it, so a prompt gives alone what it gives in company.
            seeds=[options.seed + number for _ in prompts for number in range(samples)],
            stop_ids=[self.tokenizer.eos_id],
            should_stop=lambda: self.stop.requested,
        )
        for step in steps:
            new = [row.add(token) for row, token in zip(rows, step, strict=True)]
            if streamed:
                print(new[0], end="", flush=True)
            if all(row.ended for row in rows):
                break
        rest = [row.add(None) for row in rows]
        if streamed:
            print(rest[0])
        texts = [prompts[i // samples] + row.text for i, row in enumerate(rows)]
        if not streamed:
            for number, text in enumerate(texts, start=1):
                print(f"--- {number} of {len(texts)}\n{text}")
        return texts


# ---------------------------------------------------------------------------- entry


RUN_OPTION = {
    "pretrain": pretrain,
    "finetune": finetune,
    "prompt": prompt,
    "generate": generate,
}


def main(options: Options, stop: StopRequest | None = None) -> int:
    """Run one option; returns the exit status.

    2 for bad input, 130 or 143 when interrupted, 1 where the run failed or a file was not written.
    """
    stop, ranks = stop or StopRequest(), Ranks()

    def fail(error: Exception | str, status: int) -> int:
        if ranks.is_to_say(str(error)):
            report_usage_error("run_llama.py", error)
        return status

    with stop.listening():
        try:
            ranks = Ranks.from_environment()
            if ranks.world_size > 1:
                stop.repeats, stop.silent = REPEATS, not ranks.is_main
            if options.option not in ("pretrain", "finetune"):
                check_runs_alone(f"--option {options.option}")
            timeout = options.dist_timeout
            with ranks.connected(use_gpu=options.use_gpu, timeout=timeout), ranks.quiet():
                for note in find_idle_flags(options):
                    print(note)
                return RUN_OPTION[options.option](options, stop)
        except UsageError as error:
            return fail(error, 2)
        except RunFailed as error:
            return fail(error, 1)
        except OSError as error:  # a disk that is full or fails, beside what is tried again
            where = f"{error.filename}: " if error.filename else ""
            return fail(f"{where}{error.strerror or error}", 1)
        except Interrupted:
            if ranks.is_main:
                print("stopped; there was nothing to save yet")
            return stop.exit_status
        except RuntimeError as error:
            if ranks.world_size == 1 or not is_lost_peer(error):
                raise
            said = ranks.lost_peer(options.dist_timeout)
            return fail(said, 1) if said else 1
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows `?`
    status = main(OPTIONS_GIVEN)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        exit_at_once(status)
    sys.exit(status)
