"""After the loop: what a run left, how it continues, and what its model is for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from config import TYPED_ON_RESUME
from minllama.cli.command_line import launch_command, own_script
from minllama.cli.console import human_size, say, say_command
from minllama.runs.run_folder import FLAGS_OF_A_START, RunFolder
from minllama.system.files import size_on_disk
from minllama.training.run import Run

WHAT_NEXT = "what next"  # of what was found, on the page
# In a command: what its reader has to add.
NEW_SENTENCES, NEW_DIALOGUES = "SENTENCES.txt", "DIALOGUES.jsonl"
TO_ADD = {
    NEW_SENTENCES: "sentences that it was not trained on, one a line",
    NEW_DIALOGUES: 'a {"prompt": "...", "response": "..."} a line',
}


def say_interrupted(run: Run) -> int:
    """Say what was saved and how to continue; returns the exit status."""
    options, ranks, step = run.options, run.ranks, run.progress.step
    words = ["--option", options.option, "--save_dir", str(run.folder.path), "--resume", "auto"]
    for name in sorted((options.given & TYPED_ON_RESUME) - FLAGS_OF_A_START):
        value = getattr(options, name)
        words += [f"--{name}", *([] if value is True else [str(value)])]
    several = ranks.nodes > 1
    how = "started as before, with --resume auto, it continues" if several else "continue with:"
    command = launch_command(own_script(), *words, processes=ranks.world_size)
    say_command(f"stopped after step {step:,}, and saved; {how}", None if several else command)
    return run.stop.exit_status


def print_best(run: Run) -> Path:
    """Say which model is the best of a fine-tuning; returns its file."""
    best = run.folder.file("best-model.pt")
    epoch = run.progress.best_step / run.plan.steps_per_epoch
    print()
    say(f"best model: {best}, after step {run.progress.best_step:,} (epoch {epoch:.3g})")
    return best


def print_results(
    folder: RunFolder,
    model: Path,
    *options: str,
    prompt: str | None = None,
    train: Sequence[str | Path] = (),
    test: Sequence[str | Path] = (),
) -> list[list[str]]:
    """Print the run's files with their sizes, and the commands that its new model is for.

    These are the `options`. `prompt` is a text to continue, None for a model to converse with;
    `train` are the words that name what it can be fine-tuned on, `test` those that name sentences
    that a classifier can be applied to. Returns rows of the commands for the page.
    """
    say("files:")
    for path in folder.own_files():
        print(f"  {human_size(size_on_disk(path)):>8}  {path}")
    say("next:")
    commands = []
    for option in options:
        words = ["--option", option, "--pretrained_model_path", model]
        text = ["--interactive"] if prompt is None else ["--prompt", prompt]
        words += {"generate": text, "finetune": train, "prompt": test}[option]
        commands.append([f"to {option} with it", launch_command(own_script(), *words)])
        print(" ", commands[-1][1])
        for name in TO_ADD.keys() & {*words}:
            commands[-1][0] += f" ({name}: {TO_ADD[name]})"
            say(f"    {name}: {TO_ADD[name]}")
    print(" ", launch_command(own_script("check_model_precision.py"), model))
    return commands
