"""The train loop that pretraining and finetuning share: steps, and what follows each of them.

Several ranks go through this side by side: what is decided here is the same on each, and `ranks` is
where they meet.
"""

from __future__ import annotations

from tqdm import tqdm

from minllama.cli.console import show_record, training_bar
from minllama.machine.gpus import peak_flops
from minllama.runs.metrics import Metrics
from minllama.runs.run_folder import read_on_ranks
from minllama.runs.telemetry import gpu_telemetry, profiled
from minllama.system.errors import Interrupted, RunFailed, TextLost
from minllama.training.run import Run
from minllama.training.train_step import optimizer_step

MAX_SKIPPED = 10  # updates in a row that may be skipped for numbers that are not finite
MAX_ROLLBACKS = 4  # each halves the learning rate


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
    metrics = Metrics(
        run.folder,
        done,
        last_step=lambda: run.last_step,
        save=checkpoints.save_file,
        tensorboard=options.tensorboard,
        enabled=ranks.is_main,
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
    with checkpoints, metrics, bar, run.windows, profile as step_made:
        while run.has_more() and not run.is_to_stop():
            try:
                record = progress.pending or optimizer_step(run)
            except TextLost as lost:
                run.stop_for(lost)
                continue
            step_made()
            if progress.skipped >= MAX_SKIPPED:
                roll_back(run)
                metrics.rewind(progress.step - bool(progress.pending))
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
            metrics.append(record | sample_gpu())
            show_record(bar, record)
            checkpoints.next_step(progress.step)
            if choose_best and run.note_best(record):
                run.save_best()
            ends_run |= run.out_of_patience()
            is_kept = ends_epoch and (ends_run or epoch % options.save_interval == 0)
            if is_kept or ends_run or every(options.checkpoint_interval, progress.step):
                metrics.sync()
                checkpoints.save(run.folder.epoch_checkpoint(epoch) if is_kept else None)
        stopped = run.is_to_stop(at_end=True)
        if stopped:
            metrics.state = "stopped"
            metrics.sync()
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
