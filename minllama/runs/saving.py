"""Writing a run's files while it trains: checkpoints, models, pictures.

The run can continue without any of them: a write that fails is tried again after 1, 2, 4, ... more
steps, and only one that fails at the very end fails the run. Knows nothing of what a state holds.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import secrets
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minllama.formats.pt_file import STATE_FILE, save_pt
from minllama.machine.ranks import Ranks
from minllama.runs.checkpoint import remove_unnamed
from minllama.runs.run_folder import RunFolder
from minllama.system.errors import RunFailed

LONGEST_WAIT = 64  # steps between two attempts
GRACE = 10.0  # seconds that a failing run waits for the shards of ranks that may be gone


@dataclass
class Retry:
    """A write to try again."""

    save: Callable[[], None]
    due: int  # the step after which to try
    wait: int  # steps that were waited


class Checkpoints:
    """Writes the files of a run; every rank must call every method but save_file, in one order.

    `make_state` returns the content of a resumable checkpoint as the run is now; with `sharded`,
    each rank's content has its own shards. Those are written by a thread while the training goes
    on: each rank its file, then rank 0 `state.pt`, without which the folder is no checkpoint.
    """

    def __init__(
        self,
        folder: RunFolder,
        ranks: Ranks,
        *,
        make_state: Callable[[], dict[str, Any]],
        sharded: bool,
        keep_last: int,
    ) -> None:
        self.folder, self.ranks = folder, ranks
        self.make_state, self.sharded, self.keep_last = make_state, sharded, keep_last
        self.step = 0
        self.waiting: dict[str, Retry] = {}
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None  # the sharded checkpoint being written

    def save(self, path: Path | None = None) -> None:
        """Write a resumable checkpoint, by default named after its step, and prune older ones.

        Tried again, it is one of the step at which the run is then.
        """
        self._try("checkpoint", functools.partial(self._save, path), later=lambda: self._save)

    def save_weights(self, name: str, payload: dict[str, Any]) -> None:
        """Write one of the run's weights files. Tried again, it has these same weights."""
        path = self.folder.file(name)

        def save(payload: dict[str, Any]) -> None:
            self.ranks.on_main(lambda: save_pt(path, payload))

        def later() -> Callable[[], None]:  # the payload may be the model's own memory
            return functools.partial(save, copy.deepcopy(payload))

        self._try(path.name, functools.partial(save, payload), later=later)

    def save_file(self, path: Path, write: Callable[[], None]) -> None:
        """Write another file on rank 0, which alone may call this."""
        if self.ranks.is_main:
            self._try(path.name, write)

    def drop(self, name: str) -> None:
        """Do not try again to write a file, which is of steps that were given up."""
        self.waiting.pop(name, None)

    def next_step(self, step: int) -> None:
        """After each step: try again what is due."""
        self.step = step
        for name, retry in list(self.waiting.items()):
            if step >= retry.due:
                self._try(name, retry.save, wait=min(2 * retry.wait, LONGEST_WAIT))

    def finish(self) -> None:
        """Wait for what is being written and try everything else a last time.

        Raises RunFailed, a line for each file that was not written.
        """
        self.wait()
        problems = []
        for name, retry in self.waiting.items():
            try:
                retry.save()
                self._await_shards()
            except OSError as error:
                problems.append(f"{name} was not written ({error.strerror or error})")
        self.waiting.clear()
        if problems:
            problems[-1] += "; make room, then the same command with --resume auto ends the run"
            raise RunFailed("\n".join(problems))

    def wait(self) -> None:
        """Wait for the sharded checkpoint that is being written, if any."""
        if self.pending is not None:
            self._try("checkpoint", self._await_shards, later=lambda: self._save)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        """After an error: let a sharded checkpoint that every rank has written be one."""
        if error is not None and self.pending is not None:
            with contextlib.suppress(Exception):  # the error that ends the run is the one to say
                self.pending.result(GRACE)

    def _try(
        self,
        name: str,
        save: Callable[[], None],
        *,
        later: Callable[[], Callable[[], None]] | None = None,
        wait: int = 1,
    ) -> None:
        """Write a file, or arrange to try again; `later` makes what is tried then, else `save`."""
        try:
            save()
            self.waiting.pop(name, None)
        except OSError as error:
            again = f"tries again in {wait} step{'s' * (wait > 1)}"
            tqdm.write(f"warning: {name} was not written ({error}); the run continues and {again}")
            self.waiting[name] = Retry(later() if later else save, self.step + wait, wait)

    def _save(self, path: Path | None = None) -> None:
        """Write a checkpoint, or begin to. Raises OSError on all ranks."""
        self._await_shards()
        state = self.make_state()
        path = path or self.folder.step_checkpoint(state["progress"]["step"])
        if not self.sharded:
            self.ranks.on_main(lambda: save_pt(path, state))
            self._prune(state)
            return
        folder = path.with_name(f"{path.stem}-sharded")
        self.ranks.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
        # Copies on the CPU, for the training changes these tensors while they are written.
        own = copy.deepcopy({key: state.pop(key) for key in ("model", "optimizer")})
        self.pending = self.thread.submit(self._write_shards, folder, own, state)

    def _prune(self, state: dict[str, Any]) -> None:
        progress = state["progress"]
        if self.ranks.is_main and not progress["skipped"]:  # else the last good one may be pruned
            self.folder.prune(self.keep_last, run_id=state["run_id"], step=progress["step"])

    # ------------------------------------------------------------------------ sharded checkpoints

    def _await_shards(self) -> None:
        """Wait for the sharded checkpoint that was begun, if any. Raises OSError on all ranks."""
        if self.pending is not None:
            written, self.pending = self.pending, None
            written.result()

    def _write_shards(self, folder: Path, own: dict[str, Any], state: dict[str, Any]) -> None:
        """Write this rank's file; on rank 0 then the one that names all shards.

        What a rank raises, all do. They wait for each other however long it takes, in a group of
        their own, since the training goes on in the others.
        """
        ranks = self.ranks.for_thread()
        path = folder / f"shard-{ranks.rank}-{secrets.token_hex(4)}.pt"  # new: see remove_unnamed
        try:
            digest = ranks.on_all(lambda: save_pt(path, own))
            shards = dict(ranks.gather((path.name, digest)))
            state |= {"model": {}, "optimizer": {}, "shards": shards}
            ranks.on_main(lambda: save_pt(folder / STATE_FILE, state))
        finally:  # where that failed, too: the disk may be full
            ranks.on_main(lambda: remove_unnamed(folder))
        ranks.on_main(lambda: self._prune(state))
