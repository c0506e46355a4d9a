"""Before the loop: opening a run, and its plan.

Opening one takes the folder's lock, finds the checkpoint to resume, and chooses device and dtype.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from config import FLAGS, TYPED_ON_RESUME, Options, check_options
from minllama.cli.command_line import read_stored
from minllama.cli.console import human_size, human_time, say
from minllama.formats.pt_file import state_file
from minllama.machine.device import (
    available_memory,
    check_compiler,
    choose_device,
    choose_dtype,
    compiler_problem,
    dtype_name,
    prepare_determinism,
)
from minllama.machine.gpus import peak_flops
from minllama.machine.random_state import random_state, restore_random_state, seed_everything
from minllama.machine.ranks import Ranks
from minllama.runs.checkpoints import read_on_main
from minllama.runs.plan import TrainingPlan, warn_of_plan
from minllama.runs.run_folder import RunFolder
from minllama.system.errors import UsageError
from minllama.system.files import free_disk, real_path, size_on_disk
from minllama.system.signals import StopRequest
from minllama.training.fitting import measure
from minllama.training.identity import GLOBAL_BATCH, check_identity, check_ranks_agree
from minllama.training.run import Run
from minllama.training.task import Task

HOW_RECORDS_ARE_READ = {"text_field", "label_field", "encoding", "encoding_errors"}


@contextlib.contextmanager
def open_run(options: Options, prefix: str, *, ranks: Ranks, stop: StopRequest) -> Iterator[Run]:
    """A run, alone of its kind in its folder, with what it resumes; raises UsageError."""
    options = use_checkpoint_folder(options, prefix)
    folder = RunFolder(options.save_dir, prefix)
    with contextlib.ExitStack() as held:
        if not options.plan:
            ranks.on_main(lambda: folder.check_writable())
            held.enter_context(folder.locked(ranks))
        options, checkpoint = find_start(options, folder, ranks)
        seed_everything(options.seed)
        local_rank = ranks.local_rank if ranks.world_size > 1 else None
        if options.deterministic:
            prepare_determinism()
        device, note = choose_device(options.use_gpu, local_rank=local_rank)
        say(f"device       {note}{ranks.note(options.parallel)}")
        if options.deterministic:
            say(f"repeatable   {describe_determinism(device)}")
        if options.compile == "on":
            check_compiler(device)
        dtype = choose_dtype(options.dtype, device)
        # Checkpoints keep what `auto` was: a resumed run has to compute as before.
        options = dataclasses.replace(options, dtype=dtype_name(dtype))
        run = Run(options, folder, ranks, stop, device, dtype, checkpoint)
        del checkpoint  # the run alone holds it, until it has taken it over
        yield run


# ---------------------------------------------------------------------------- resuming


def use_checkpoint_folder(options: Options, prefix: str) -> Options:
    """A run resumed from a file continues in that file's folder, or in the folder that is named.

    Raises UsageError for another --save_dir, and where there is no checkpoint.
    """
    if options.resume in (None, "auto"):
        return options
    path = Path(options.resume)
    in_folder = path.is_dir() and not state_file(path).is_file()
    if in_folder and not RunFolder(path, prefix).checkpoints():
        raise UsageError(f"--resume {path}: the folder holds no {prefix} checkpoint")
    if not in_folder and not state_file(path).is_file():
        raise UsageError(
            f"--resume {path}: no such file; --resume alone takes the newest in --save_dir"
        )
    folder = path if in_folder else path.parent
    if "save_dir" in options.given and real_path(options.save_dir) != real_path(folder):
        raise UsageError(
            f"--resume {options.resume} lies outside --save_dir {options.save_dir}: a run "
            f"continues where its files are, so leave --save_dir out or give {folder}"
        )
    resume = "auto" if in_folder else options.resume
    return dataclasses.replace(options, save_dir=folder, resume=resume)


def use_recorded_reading(options: Options, prefix: str) -> Options:
    """How a resumed run's labelled files are read, as it was typed when the run was started.

    They are looked into before the checkpoint is, whose options come later. Raises UsageError.
    """
    folder = RunFolder(options.save_dir, prefix)
    names = (HOW_RECORDS_ARE_READ & (folder.typed() or set())) - options.given
    if options.resume is None or not names:
        return options
    stored, where = folder.starts()[0].get("options"), str(folder.file("run.json"))
    names &= stored.keys() if isinstance(stored, dict) else set()
    values = {name: read_stored(FLAGS[name], stored[name], where=where) for name in names}
    return dataclasses.replace(options, **values, given=options.given | names)


def find_start(
    options: Options, folder: RunFolder, ranks: Ranks
) -> tuple[Options, dict[str, Any] | None]:
    """The options, as the checkpoint has what was not typed, and the checkpoint to resume, if any.

    They have the global batch. A run that its launcher restarts is resumed, whatever the command
    says. Raises UsageError, also where the folder holds another run.
    """
    if ranks.on_main(lambda: any(map(ranks.is_launch_of, folder.starts()[-1:]))):
        print(
            "restarted: the run of this --rdzv-id is resumed"
            + (", and --overwrite is ignored; a new id starts over" if options.overwrite else "")
        )
        options = dataclasses.replace(options, resume="auto", overwrite=False)
    resume, overwrite = options.resume, options.overwrite
    if not options.plan:
        model = options.pretrained_model_path
        ranks.on_main(
            lambda: folder.check_free(resume=resume is not None, overwrite=overwrite, model=model)
        )
    newest = None
    if resume is not None:
        newest = read_on_main(ranks, lambda: folder.find_checkpoint(resume))
        if newest is None:
            ranks.on_main(lambda: check_names_its_data(options, folder))
            print(f"--resume auto: no checkpoint in {folder.path} yet: starting from the beginning")
    if newest is None:
        return options.with_global_batch(ranks.world_size), None
    path, checkpoint = newest
    say(f"resuming     {path}, made after step {checkpoint['progress']['step']:,}")
    before = checkpoint.get("options", {})
    if not isinstance(before, dict):
        raise UsageError(f"{path} is damaged: its options are no dict")
    whole_batch = {"global_batch_size": checkpoint["identity"].get(GLOBAL_BATCH)}
    options = options.resumed(before | whole_batch)
    check_options(options)  # the flags typed now with those that the checkpoint brings
    texts = options.pretrain_data if options.option == "pretrain" else ()
    if texts and "pretrain_data" not in options.given:
        print(f"             on its text: {', '.join(texts)} (--pretrain_data)")
    if options.option == "finetune" and options.compile == "on":
        print(
            "             kernels compiled for any length depend on the first ones that they meet: "
            "a resumed run may differ in the last digits (not with --compile off)"
        )
    options = options.with_global_batch(ranks.world_size)
    now = options.to_plain()
    for name in sorted(options.given - TYPED_ON_RESUME):
        if name in before and now[name] not in (before[name], "auto"):
            print(f"changed      --{name} from {before[name]} to {now[name]}")
    return options, checkpoint


def check_names_its_data(options: Options, folder: RunFolder) -> None:
    """Raise UsageError where only runs on other data than the default could be meant."""
    runs = [path.name.removesuffix("-run.json") for path in folder.path.glob("finetune-*-run.json")]
    if options.option == "finetune" and "train" not in options.given:
        if runs and folder.prefix not in runs:
            raise UsageError(
                f"--resume {options.resume}: {folder.path} holds no {folder.prefix} run, but "
                f"that of {min(runs)}: name its --train"
            )


# ---------------------------------------------------------------------------- the plan


def make_plan(run: Run, task: Task) -> None:
    """Make and print the plan, compare with the checkpoint, and decide --compile auto.

    Every rank must call this. Raises UsageError where the run cannot be resumed so, or its files do
    not fit on the disk.
    """
    options, ranks, device, dtype = run.options, run.ranks, run.device, dtype_name(run.dtype)
    run.task = task
    run.identity = task.identity | {
        GLOBAL_BATCH: options.global_batch_size,
        "--seed": options.seed,
        "--optimizer": options.optimizer,
    }
    if run.checkpoint is not None:
        where = {"folder": run.folder, "ranks": ranks}
        check_identity(run.checkpoint, run.identity, options=options, **where)
    run.plan = plan = TrainingPlan(options, ranks.world_size, device.type, dtype, **task.sizes)
    done = 0 if run.checkpoint is None else run.checkpoint["progress"]["step"]
    ranks.on_main(lambda: print_plan(plan, device, run.folder, steps_left=plan.last_step - done))
    if options.option == "pretrain":
        run.options = ranks.on_main(lambda: decide_compile(options, plan, device))
    check_ranks_agree(run.identity | {"--dtype": dtype}, ranks)


# Without the compiler: FLOP/s of a CPU's thread, and the share of a GPU's peak.
TIMED_PARAMETERS = 20_000_000  # at most, of a model that is timed for the plan
EAGER_FLOPS, EAGER_MFU = {"float32": 60e9, "bfloat16": 120e9, "float16": 60e9}, 0.28


def print_plan(
    plan: TrainingPlan, device: torch.device, folder: RunFolder, *, steps_left: int
) -> None:
    """Print the plan and warn of what will not fit.

    Raises UsageError if the disk is too small for the run; --plan alone warns of that, too.
    """
    available = available_memory(device)
    say(*plan.lines(available), time_line(plan, device, steps_left))
    warn_of_plan(plan, available)
    # What the folder holds is replaced, resumed or pruned: it is not needed twice.
    there, whole = sum(map(size_on_disk, folder.own_files())), sum(plan.disk().values())
    free = free_disk(folder.path)
    if whole - there <= free:
        return
    less = [*plan.flags_for_less_disk(), "a folder on a larger disk"]
    problem = (
        f"--save_dir {folder.path}: {human_size(free)} are free on that disk and the run's files "
        f"take {human_size(whole - there)} more ({plan.disk_line()}); less with {' or '.join(less)}"
    )
    if not plan.options.plan:
        raise UsageError(problem)
    say(f"warning: {problem}")


def time_line(plan: TrainingPlan, device: torch.device, steps_left: int) -> str:
    """How long the training will take, by a few steps that are timed here, or by its arithmetic.

    A large model is not made twice for it, and a GPU's peak of memory is left to the training.
    """
    options, config = plan.options, plan.config
    if plan.is_timed:
        return f"time         {options.minutes:g} min in all, whatever the steps (--minutes)"
    speed = None  # also where the memory is too small for it
    if device.type == "cpu" and config.parameters <= TIMED_PARAMETERS:
        rows = min(options.micro_batch_size, plan.sequences)
        context = max(1, round(plan.tokens / plan.sequences))
        shape = dataclasses.replace(config, vocab_size=plan.logits_width)  # a classifier's: labels
        dtype, before = getattr(torch, plan.dtype), random_state()
        speed = measure(options, shape, device, dtype, rows=rows, context=context, most=0.1)
        restore_random_state(before)
    if speed is not None:
        seconds, how = plan.step_tokens * speed.token + speed.update, "by steps timed here"
    else:
        seconds, how = plan.step_seconds(eager_flops(device, plan.dtype)), "not measured: expected"
    rate = plan.world_size * plan.step_tokens / seconds
    took = human_time(max(0, steps_left) * seconds)
    return f"time         about {took} of training, at {rate:,.0f} tokens/s ({how})"


def describe_determinism(device: torch.device) -> str:
    """What --deterministic does on a device, and what it costs."""
    if device.type != "cuda":
        return "--deterministic has no effect here: it changes CUDA's kernels alone"
    return (
        "steps are the same bits every time (--deterministic), and take longer: attention's "
        "backward pass adds in a fixed order, and the compiler does not try out kernels"
    )


def decide_compile(options: Options, plan: TrainingPlan, device: torch.device) -> Options:
    """The options of a pretraining with --compile auto decided; says what and why.

    The plan decides by how long the run takes. Checkpoints keep the decision: compiled arithmetic
    rounds differently, and a resumed run has to be bit-identical.
    """
    if options.compile == "on":
        say("compile      on: before the first step, which takes half a minute or more")
    if options.compile != "auto" or device.type == "mps":
        return options
    if device.type == "cuda" and plan.shards > 1:
        pays, reason = False, "with --parallel fsdp layers are gathered between their kernels"
    else:
        pays, reason = plan.compiling_pays(eager_flops(device, plan.dtype))
    if pays and (problem := compiler_problem(device)) is not None:
        pays, reason = False, f"{reason}, but torch cannot compile here ({problem})"
    decided = "on" if pays else "off"
    say(f"compile      {decided}: {reason}")
    return dataclasses.replace(options, compile=decided)


def eager_flops(device: torch.device, dtype: str) -> float:
    """FLOP/s that training without the compiler reaches, from what was measured."""
    if device.type != "cpu":
        return EAGER_MFU * peak_flops(device, getattr(torch, dtype))
    return EAGER_FLOPS[dtype] * torch.get_num_threads()
