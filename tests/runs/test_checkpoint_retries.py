"""Writing a run's files while it trains: what the disk does not take is tried again."""

from __future__ import annotations

import errno
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import survivor
import torch
from survivor import content_digest, joined, small_payload

from minllama.formats.pt_file import STATE_FILE, load_pt, save_pt
from minllama.machine.ranks import Ranks
from minllama.runs import checkpoints
from minllama.runs.checkpoints import MAX_RETRY_DELAY, Checkpoints, load_checkpoint
from minllama.runs.run_folder import RunFolder
from minllama.system.errors import RunFailed


class Run:
    """What a run's files are written of: a step, and weights that change with it."""

    def __init__(self, *, sharded: bool = False, keep_last: int = 2) -> None:
        self.step, self.skipped = 0, 0
        self.weights = torch.zeros(3)
        self.folder = RunFolder(Path("run"), "pretrain")
        self.checkpoints = Checkpoints(self.folder, Ranks(), sharded=sharded, keep_last=keep_last)

    def state(self) -> dict[str, Any]:
        progress = {"step": self.step, "skipped": self.skipped}
        return small_payload(self.step) | {"model": {"w": self.weights}, "progress": progress}

    def train(self, steps: int = 1) -> None:
        """Make steps, each followed by another attempt at what is due."""
        for _ in range(steps):
            self.step += 1
            self.weights += 1
            self.checkpoints.after_step(self.step)
            if self.checkpoints.is_due_again():
                self.save()

    def save(self, path: Path | None = None) -> None:
        """Save the state as it is now."""
        self.checkpoints.save(self.state(), path)

    def saved(self) -> list[int]:
        """The steps of the checkpoints that are there, all of them whole and true."""
        found = {}
        for path in self.folder.checkpoints():
            state = load_checkpoint(path)
            found[state["progress"]["step"]] = joined(state["model"]["w"])
        assert all(torch.equal(w, torch.full((3,), float(step))) for step, w in found.items())
        return sorted(found)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder, with a run's folder in it."""
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()


@pytest.fixture
def run() -> Run:
    return Run()


@pytest.fixture
def sharded_run() -> Iterator[Run]:
    """A run of one rank whose checkpoints are sharded."""
    run = Run(sharded=True)
    yield run
    run.checkpoints.thread.shutdown()


# ---------------------------------------------------------------------------- tried again


def test_what_the_disk_takes_is_there_at_once(run, capsys):
    """Nothing is said, and what is older than the last two goes."""
    for _ in range(3):
        run.train()
        run.save()
    run.save(run.folder.epoch_checkpoint(1))
    run.checkpoints.save_weights("best-model.pt", {"model": {"w": run.weights}})
    run.checkpoints.finish()
    assert run.saved() == [2, 3] and run.folder.epoch_checkpoint(1).is_file()
    assert load_pt(run.folder.file("best-model.pt"))["model"]["w"].tolist() == [3, 3, 3]
    assert not any(capsys.readouterr())


def test_a_checkpoint_that_failed_once_is_that_of_the_next_step(run, capsys):
    """The state of its own step is gone by then."""
    run.train(3)
    with survivor.failing("disk full", "*.pt", 1):
        run.save()
        assert "pretrain-step-3.pt" not in [path.name for path in Path("run").iterdir()]
        run.train()
        assert run.saved() == [4]
        run.train(2)
    said = capsys.readouterr().out
    assert said.count("warning: checkpoint was not written") == 1
    assert "No space left" in said and "tries again in 1 step\n" in said
    run.checkpoints.finish()
    assert run.saved() == [4]


def test_weights_that_failed_are_written_as_they_were(run):
    """The best model is that of its step, though the training went on in the same memory."""
    run.train(3)
    with survivor.failing("I/O error", "best-model.pt", 1):
        run.checkpoints.save_weights("best-model.pt", {"model": {"w": run.weights}})
        run.train()
    assert load_pt(run.folder.file("best-model.pt"))["model"]["w"].tolist() == [3, 3, 3]


def test_it_waits_twice_as_long_each_time(run, capsys):
    """A full disk is not written to at every step; at the latest every 64th it is tried."""
    tried = []

    def write() -> None:
        tried.append(run.step)
        raise OSError(errno.ENOSPC, "No space left on device")

    run.train()
    run.checkpoints.save_file(Path("run", "curve.svg"), write)
    run.train(200)
    waits = [later - earlier for earlier, later in zip(tried, tried[1:], strict=False)]
    assert waits == [1, 2, 4, 8, 16, 32, 64, 64] and MAX_RETRY_DELAY == 64
    assert capsys.readouterr().out.count("curve.svg was not written") == len(tried)


def test_several_files_wait_side_by_side(run):
    """One that a later save of it replaced is not written over that."""
    with survivor.failing("permission denied", "*.pt", 3):
        run.checkpoints.save_weights("best-model.pt", {"model": {"w": run.weights}})
        run.save()
        run.checkpoints.save_file(Path("run", "a"), Path("run", "a").touch)
        run.weights += 1
        run.checkpoints.save_weights("best-model.pt", {"model": {"w": run.weights}})
        run.weights -= 1
    run.train()
    assert run.saved() == [1] and Path("run", "a").exists()
    assert load_pt(run.folder.file("best-model.pt"))["model"]["w"].tolist() == [1, 1, 1]
    run.checkpoints.finish()


def test_the_end_tries_all_again_and_names_what_failed(run):
    """A line for each file; the last one tells what to do."""
    with survivor.failing("disk full", "*.pt", 99):
        run.save()
        run.checkpoints.save_weights("final-model.pt", {"model": {}})
        with pytest.raises(RunFailed) as error:
            run.checkpoints.finish()
    first, second = str(error.value).splitlines()
    assert first.startswith("checkpoint was not written (No space left")
    assert second.startswith("final-model.pt was not written") and "--resume auto" in second
    run.checkpoints.save_weights("final-model.pt", {"model": {}})
    run.checkpoints.finish()


def test_other_errors_are_not_taken_for_the_disks(run):
    """A bug must show."""
    with pytest.raises(AttributeError):
        run.checkpoints.save_weights("final-model.pt", {"model": {}, "odd": lambda: 1})
    assert not run.checkpoints.retries


def test_the_last_good_checkpoint_outlives_bad_steps(run):
    """While updates are skipped nothing is pruned: the run may go back to the oldest one."""
    for step in range(1, 5):
        run.skipped = step - 1
        run.train()
        run.save()
    assert run.saved() == [1, 2, 3, 4]
    run.skipped = 0
    run.train()
    run.save()
    assert run.saved() == [4, 5]


# ---------------------------------------------------------------------------- shards


def shard_files(step: int) -> set[str]:
    folder = Path("run", f"pretrain-step-{step}-sharded")
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_the_training_changes_nothing_that_is_being_written(sharded_run, monkeypatch):
    """A thread writes while the next steps are made; state.pt, without which it is none, last."""
    run, begun, may_end, written = sharded_run, threading.Event(), threading.Event(), []

    def slow(path: Path, payload: dict[str, Any]) -> str:
        begun.set()
        assert may_end.wait(30)
        written.append(path.name)
        return save_pt(path, payload)

    monkeypatch.setattr(checkpoints, "save_pt", slow)
    run.train(3)
    run.save()
    assert begun.wait(30)
    run.train(2)
    assert not run.folder.checkpoints()
    may_end.set()
    run.checkpoints.join()
    assert run.saved() == [3] and written[-1] == STATE_FILE and len(shard_files(3)) == 2
    run.checkpoints.finish()


def test_a_save_waits_for_the_one_before(sharded_run):
    """They do not pile up in memory; older ones are pruned as ever."""
    for _ in range(4):
        sharded_run.train()
        sharded_run.save()
    sharded_run.checkpoints.finish()
    assert sharded_run.saved() == [3, 4]


@pytest.mark.parametrize("fault", sorted(survivor.FAULTS))
@pytest.mark.parametrize("file", ["shard-*.pt", STATE_FILE])
def test_a_failing_disk_leaves_a_sharded_checkpoint_as_it_was(sharded_run, fault, file, capsys):
    """One of the same step stays whole until the new one is; then nothing of the old is left."""
    run, path = sharded_run, Path("run", "pretrain-step-3.pt")
    run.train(3)
    run.save(path)
    run.checkpoints.join()
    before = shard_files(3)
    content = content_digest(load_checkpoint(run.folder.checkpoints()[0]))
    with survivor.failing(fault, file, 1) as log:
        run.save(path)
        run.checkpoints.join()
    assert any(line.startswith("failed") for line in log)
    assert content_digest(load_checkpoint(run.folder.checkpoints()[0])) == content
    assert shard_files(3) == before
    assert "warning: checkpoint was not written" in capsys.readouterr().out
    run.train()
    run.checkpoints.finish()
    assert run.saved() == [3, 4]
    run.save(path)
    run.checkpoints.finish()
    assert len(shard_files(3)) == 2 and not shard_files(3) & (before - {STATE_FILE})


def test_a_first_sharded_checkpoint_that_fails_leaves_nothing(sharded_run):
    """The disk may be full: what was written of it is of no use."""
    sharded_run.train()
    with survivor.failing("disk full", STATE_FILE, 9):
        sharded_run.save()
        sharded_run.checkpoints.join()
        assert not shard_files(1)
        with pytest.raises(RunFailed, match="checkpoint was not written"):
            sharded_run.checkpoints.finish()
    assert not sharded_run.folder.checkpoints()


@pytest.mark.parametrize("disk_fails", [False, True])
def test_an_error_that_ends_the_run_lets_the_checkpoint_end(sharded_run, disk_fails):
    """What every rank has written is not thrown away; only the run's own error is raised."""
    run = sharded_run
    run.train(2)
    with (
        survivor.failing("I/O error", "shard-*.pt", int(disk_fails)),
        pytest.raises(ZeroDivisionError),
        run.checkpoints,
    ):
        run.save()
        raise ZeroDivisionError
    assert run.saved() == ([] if disk_fails else [2])


def test_a_folder_that_cannot_be_made_is_tried_again(sharded_run, monkeypatch, capsys):
    """Its mkdir alone stood outside of what is tried again, and ended the run."""
    run, real, left = sharded_run, Path.mkdir, [1]

    def mkdir(path: Path, *arguments: Any, **settings: Any) -> None:
        if path.name.endswith("-sharded") and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, *arguments, **settings)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    run.train(3)
    run.save()
    assert "checkpoint was not written" in capsys.readouterr().out
    run.train(2)
    run.checkpoints.finish()
    assert run.saved() == [4], "once: it is not due again when the next one is begun"


def test_a_checkpoint_that_is_written_is_not_held_in_memory(sharded_run):
    """Its copied shards were, to the run's end: of a large model more than the host has."""
    run = sharded_run
    state = run.state()
    run.checkpoints.save(state)
    (copied,) = (a for a in run.checkpoints.rewrite.args if isinstance(a, dict) and "model" in a)
    copied = weakref.ref(copied["model"]["w"])
    run.checkpoints.join()
    assert run.saved() == [0] and copied() is None


def test_what_could_not_be_deleted_is_deleted_later(run, monkeypatch):
    """One busy file was forgotten, and stayed for good."""
    real, left = checkpoints.remove_checkpoint, [1]

    def remove(path: Path) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        real(path)

    monkeypatch.setattr(checkpoints, "remove_checkpoint", remove)
    for _ in range(4):
        run.train()
        run.save()
    assert run.saved() == [3, 4]
