"""What a run stands on, taken away while it trains: it stops, saves what it made and says so."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from running import (
    RESUME,
    assert_same,
    assert_same_run,
    command,
    pretrain,
    read_ahead,
    steps,
    write_stories,
)

from minllama.machine.ranks import Ranks
from minllama.runs import run_folder
from minllama.runs.checkpoints import load_checkpoint
from minllama.training import loop

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows locks what is open")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, with a text; a run looks around at every step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder, "CHECK_SECONDS", 0.0)
    write_stories(tmp_path)


def before_step(step: int, hurt: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
    """Do something just before optimizer step number `step` is made."""
    real = loop.optimizer_step

    def optimizer_step(run: loop.Run, batches: loop.Prefetch):
        if run.progress.step + 1 == step:
            hurt()
        return real(run, batches)

    patch.setattr(loop, "optimizer_step", optimizer_step)


def cut_off() -> None:
    os.truncate(next(Path("cache").glob("*.tokens")), 300)


def write_over() -> None:
    path = next(Path("cache").glob("*.tokens"))
    path.write_bytes(b"\xff" * path.stat().st_size)
    os.utime(path, (1, 1))


def test_a_batch_that_could_not_be_read_ahead_ends_the_run_at_its_own_step(monkeypatch):
    """Not at the one that ran meanwhile, whose batches were there: it is trained, and saved."""
    assert pretrain("--max_steps 5 --save_dir whole").status == 0
    real = loop.optimizer_step

    def optimizer_step(run: loop.Run, batches: loop.Prefetch):
        if run.progress.step == 2:
            batches.next[1].result()  # step 3's batches
            cut_off()
        return real(run, batches)

    with monkeypatch.context() as patch:
        read_ahead(patch)
        patch.setattr(loop, "optimizer_step", optimizer_step)
        done = pretrain("--max_steps 5")
    assert done.status == 1 and "stopped after step 3, and saved" in done.error
    assert command(f"{RESUME} --max_steps 5").status == 0
    assert_same_run("whole", "run", "pretrain-step-5.pt")


@pytest.mark.parametrize("hurt", [cut_off, write_over])
@pytest.mark.parametrize("words", ["", "--eval_interval 2"])
def test_a_token_cache_that_is_hurt_costs_nothing(hurt, words, monkeypatch):
    """Cut off it was a SIGBUS without a word, written over an IndexError; both lost the training.

    Also in the middle of a validation, whose step is then evaluated by the resumed run.
    """
    words = f"--max_steps 4 --dropout 0.1 {words}"
    assert pretrain(f"{words} --save_dir whole").status == 0
    with monkeypatch.context() as patch:
        if "eval" in words:
            real = loop.optimizer_step
            patch.setattr(
                loop,
                "optimizer_step",
                lambda run, batches: (real(run, batches), run.progress.step == 2 and hurt())[0],
            )
        else:
            before_step(3, hurt, patch)
        done = pretrain(words)
    assert done.status == 1 and done.error.count("\n") == 1
    assert "was cut off or written over while the run was reading it: stopped after" in done.error
    assert "step 2, and saved" in done.error
    done = command(f"{RESUME} --max_steps 4")
    assert done.status == 0 and "tokenized again" in done.out
    assert steps() == [1, 2, 3, 4]
    for part in ("model", "optimizer", "rng", "progress"):
        one, two = (load_checkpoint(Path(name, "pretrain-step-4.pt")) for name in ("whole", "run"))
        assert_same(one[part], two[part])


@pytest.mark.parametrize("lost", ["renamed", "removed", "replaced", "lock"])
def test_a_run_whose_folder_is_taken_away_stops(lost, monkeypatch):
    """It went on to the end and exit status 0, its metrics gone with the folder."""

    def hurt() -> None:
        if lost == "lock":
            Path("run/run.lock").unlink()
        elif lost == "removed":
            shutil.rmtree("run")
        else:
            Path("run").rename("elsewhere")
        if lost == "replaced":
            Path("run").mkdir()

    before_step(3, hurt, monkeypatch)
    done = pretrain("--max_steps 6 --checkpoint_interval 2")
    assert done.status == 1 and done.error.count("\n") == 1
    assert "--save_dir run, or the run.lock in it, was removed, renamed or replaced" in done.error
    assert "stopped after step 3, and saved" in done.error
    names = {path.name for path in Path("run").iterdir()} - {"run.lock"}
    assert {"pretrain-step-3.pt", "metrics.jsonl"} <= names
    assert steps() == ([1, 2, 3] if lost == "lock" else [3])
    if lost in ("renamed", "replaced"):
        assert steps("elsewhere/metrics.jsonl") == [1, 2]
        assert Path("elsewhere/pretrain-step-2.pt").is_file()
    done = command(f"{RESUME} --max_steps 6")
    assert done.status == 0 and steps()[-3:] == [4, 5, 6]
    assert ("lacks 2 of 3 steps" in done.out) == (lost != "lock")


def test_a_run_stops_when_its_launcher_is_gone(monkeypatch):
    """torchrun was killed, and its processes trained on, unseen, to the end."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    before_step(3, lambda: monkeypatch.setattr(os, "getppid", lambda: 1), monkeypatch)
    done = pretrain("--max_steps 6")
    assert done.status == 1 and done.error.count("\n") == 1
    assert "the launcher of this process ended without it: stopped after step 3" in done.error
    assert Path("run/pretrain-step-3.pt").is_file()


def test_without_a_launcher_none_is_missed(monkeypatch):
    """A run that outlives its shell, as under nohup, is no orphan."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    ranks = Ranks.from_environment()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert not ranks.launcher_is_gone()
