"""Resumable checkpoints: what is in one, reading it, and writing it while the run trains.

A checkpoint holds everything of a run that is not a flag or a data file: weights, optimizer, random
state, progress. Of a model sharded over several ranks it is a folder: `state.pt` with the plain
values and the SHA-256 of every other file, written last, and a file of shards from each rank. Any
number of ranks reads either kind.

The run can continue without any file that it writes: a write that fails is tried again after 1, 2,
4, ... more steps, and only one that fails at the very end fails the run.
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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm import tqdm

from minllama.formats.pt_file import STATE_FILE, load_pt, save_pt, state_file
from minllama.machine.ranks import Ranks
from minllama.machine.sharding import to_meta
from minllama.system.errors import RunFailed, UsageError
from minllama.system.files import remove

if TYPE_CHECKING:
    from minllama.runs.run_folder import RunFolder

STATE_KEYS = ("model", "optimizer", "scaler", "rng", "progress", "identity")  # each a dict
MOST_COUNT = 2**62  # of steps, tokens, seconds
MAX_RETRY_DELAY = 64  # steps between two attempts
GRACE = 10.0  # seconds that a failing run waits for the shards of ranks that may be gone

# ---------------------------------------------------------------------------- reading


class Summary(NamedTuple):
    """What a checkpoint says of itself, unverified."""

    run_id: str
    step: int
    skipped: int  # updates that were skipped in a row, up to this step
    complete: bool  # the step's record was evaluated and written


def load_checkpoint(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """A run's state, its tensors mapped from the disk; runs no code.

    Of a sharded checkpoint every tensor is the list of its shards, which `sharding.join_shards`
    joins. Raises UsageError naming the file that is missing, damaged or holds no such state.
    """
    payload = _load_plain(path, verify=verify)
    if not path.is_dir():
        return payload
    shards = [
        load_pt(path / name, verify=verify, digest=digest)
        for name, digest in _listed_shards(path, payload).items()
    ]
    try:
        return payload | {
            key: _collect_shards(*(s[key] for s in shards)) for key in ("model", "optimizer")
        }
    except (KeyError, TypeError, AttributeError):
        raise UsageError(f"{path}: its shards do not belong together") from None


def summarize(path: Path) -> Summary:
    """Read a checkpoint's plain values and none of its tensors. Raises UsageError."""
    payload = _load_plain(path, verify=False)
    progress, run_id = payload["progress"], payload.get("run_id")
    try:
        step = checked_number("step", progress.get("step"))
        skipped = checked_number("skipped", progress.get("skipped", 0))
        if not isinstance(run_id, str):
            raise ValueError("it names no run")
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}") from None
    return Summary(run_id, step, skipped, progress.get("pending") is None)


def checked_number(name: str, value: Any, *, kind: type = int, least: int = 0) -> Any:
    """A number of a checkpoint, which counts or measures; raises ValueError for anything else."""
    right = type(value) is kind and least <= value <= MOST_COUNT  # not so of NaN
    if not right:
        raise ValueError(f"its {name} is {str(value)[:20]!r}")
    return value


def read_on_main(
    ranks: Ranks, read: Callable[[], tuple[Path, dict[str, Any]] | None]
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that `read` gives rank 0, which alone reads it. Every rank must call this.

    The other ranks get what is plain, and of the tensors of model and optimizer the shapes: the
    values come one tensor at a time, by `sharding.broadcast_or_shard`.
    """

    def without_values(
        checkpoint: tuple[Path, dict[str, Any]] | None,
    ) -> tuple[Path, dict[str, Any]] | None:
        if checkpoint is None:
            return None
        path, state = checkpoint
        return path, state | {key: to_meta(state[key]) for key in ("model", "optimizer")}

    return ranks.on_main(read, tell=without_values)


def remove_unlisted_shards(folder: Path) -> None:
    """Delete the shards that the checkpoint in a folder does not name; all, where there is none.

    So one of the same step stays whole until another takes its place. Best effort.
    """
    with contextlib.suppress(OSError, UsageError):
        if not (folder / STATE_FILE).exists():
            remove(folder)
            return
        listed = _listed_shards(folder, _load_plain(folder, verify=False))
        for path in [*folder.glob("shard-*"), *folder.glob(".*.tmp")]:
            if path.name not in listed:
                with contextlib.suppress(OSError):
                    remove(path)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, so that killed between two files it is none rather than half of one."""
    if path.is_dir():
        (path / STATE_FILE).unlink(missing_ok=True)  # of an attempt that got no further
    remove(path)


def _load_plain(path: Path, *, verify: bool) -> dict[str, Any]:
    """The content of `state_file(path)`; raises UsageError where that is no state of a run."""
    payload = load_pt(state_file(path), verify=verify)
    missing = sorted(set(STATE_KEYS) - payload.keys())
    if missing or not all(isinstance(payload[name], dict) for name in STATE_KEYS):
        raise UsageError(
            f"{path} is a weights file and holds no state to resume "
            f"({', '.join(missing) or 'other types'}): name a -epoch-N.pt or -step-N.pt file"
        )
    return payload


def _listed_shards(folder: Path, payload: dict[str, Any]) -> dict[str, str]:
    """The SHA-256 of each file of shards by its name, which leads out of no folder."""
    shards = payload.get("shards")
    if not isinstance(shards, dict) or not shards:
        raise UsageError(f"{folder / STATE_FILE}: lists no shards, so it is no sharded checkpoint")
    for name, digest in shards.items():
        if not (isinstance(name, str) and isinstance(digest, str) and Path(name).name == name):
            raise UsageError(f"{folder / STATE_FILE}: {name!r} is not the name of a shard's file")
    return shards


def _collect_shards(*nodes: Any) -> Any:
    """Nested dicts of the ranks as one, with a list of shards for each tensor."""
    first = nodes[0]
    if torch.is_tensor(first):
        return list(nodes)
    if isinstance(first, dict):
        return {key: _collect_shards(*(node[key] for node in nodes)) for key in first}
    return first


# ---------------------------------------------------------------------------- writing


@dataclass
class Retry:
    """A write that failed and is to be tried again."""

    write: Callable[[], None] | None  # None: of a checkpoint whose tensors have changed since
    due: int  # the step after which to try
    delay: int  # steps until then


class Checkpoints:
    """Writes the files of a run; every rank must call every method but save_file, in one order.

    A state is handed to `save` as it is at that moment. With `sharded`, each rank passes its own
    shards, and a thread writes them while the training continues: each rank its file, then rank 0
    `state.pt`, without which the folder is no checkpoint.
    """

    def __init__(self, folder: RunFolder, ranks: Ranks, *, sharded: bool, keep_last: int) -> None:
        self.folder, self.ranks = folder, ranks
        self.sharded, self.keep_last = sharded, keep_last
        self.step = 0
        self.kept: list[Path] = []  # this run's step checkpoints on the disk, oldest first
        self.retries: dict[str, Retry] = {}
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None  # the sharded checkpoint on its way
        self.rewrite: Callable[[], None] | None = None  # that one, from its copied shards

    # ------------------------------------------------------------------------ what is written

    def save(self, state: dict[str, Any], path: Path | None = None) -> None:
        """Write a resumable checkpoint, by default named after its step, and prune older ones."""
        self.join()
        path = path or self.folder.step_checkpoint(state["progress"]["step"])
        write = functools.partial(self._write, path, state)
        if self.sharded:
            # Copies on the CPU, for the training changes these tensors while they are written.
            shards = copy.deepcopy({key: state.pop(key) for key in ("model", "optimizer")})
            folder = path.with_name(f"{path.stem}-sharded")
            write = functools.partial(self._begin_shards, folder, shards, state)
        self._try("checkpoint", write)

    def is_due_again(self) -> bool:
        """Whether a checkpoint that failed is to be saved again, as the run is now."""
        retry = self.retries.get("checkpoint")
        return retry is not None and self.step >= retry.due

    def save_weights(self, name: str, payload: dict[str, Any]) -> None:
        """Write one of the run's weights files. Tried again, it has these same weights."""
        path = self.folder.file(name)

        def write(payload: dict[str, Any]) -> None:
            self.ranks.on_main(lambda: save_pt(path, payload))

        self._try(path.name, functools.partial(write, payload))
        if path.name in self.retries:  # the payload may be the model's own memory
            self.retries[path.name].write = functools.partial(write, copy.deepcopy(payload))

    def save_file(self, path: Path, write: Callable[[], None]) -> None:
        """Write another file on rank 0, which alone may call this."""
        if self.ranks.is_main:
            self._try(path.name, write)

    def drop(self, name: str) -> None:
        """Do not try again to write a file, which is of steps that were given up."""
        self.retries.pop(name, None)

    # ------------------------------------------------------------------------ when

    def after_step(self, step: int) -> None:
        """Try again what is due, but for checkpoints: those are saved anew (see `is_due_again`)."""
        self.step = step
        for name, retry in list(self.retries.items()):
            if name == "checkpoint":
                retry.write = None  # of another step, it must not be written, nor held in memory
            elif step >= retry.due:
                self._try(name, retry.write)

    def join(self) -> None:
        """Wait for the sharded checkpoint that is being written, if any."""
        if self.writing is not None:
            retry_with, self.rewrite = self.rewrite, None
            self._try("checkpoint", self._await_shards, retry_with=retry_with)

    def finish(self) -> None:
        """Wait for what is being written and try everything else a last time.

        Since the last `save` no step may have been made. Raises RunFailed, a line for each file
        that was not written.
        """
        self.join()
        problems = []
        for name, retry in self.retries.items():
            try:
                retry.write()
                self._await_shards()
            except OSError as error:
                problems.append(f"{name} was not written ({error.strerror or error})")
        self.retries.clear()
        if problems:
            problems[-1] += "; make room, then the same command with --resume auto ends the run"
            raise RunFailed("\n".join(problems))

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        """After an error: let a sharded checkpoint that every rank has written be one."""
        if error is not None and self.writing is not None:
            with contextlib.suppress(Exception):  # the error that ends the run is the one to say
                self.writing.result(GRACE)

    def _try(
        self, name: str, write: Callable[[], None], *, retry_with: Callable[[], None] | None = None
    ) -> None:
        """Write a file, or arrange to try again, with `retry_with` where that is not `write`."""
        try:
            write()
            self.retries.pop(name, None)
        except OSError as error:
            failed = self.retries.get(name)
            is_retry = failed is not None and self.step >= failed.due
            delay = min(2 * failed.delay, MAX_RETRY_DELAY) if is_retry else 1
            tqdm.write(
                f"warning: {name} was not written ({error}); the run continues and tries again in "
                f"{delay} step{'s' * (delay > 1)}"
            )
            self.retries[name] = Retry(retry_with or write, self.step + delay, delay)

    # ------------------------------------------------------------------------ how

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        """Write a checkpoint in one file. Raises OSError on all ranks."""
        self.ranks.on_main(lambda: save_pt(path, state))
        self._note_written(path, state)

    def _begin_shards(self, folder: Path, shards: dict[str, Any], state: dict[str, Any]) -> None:
        """Begin to write a sharded checkpoint. Raises OSError on all ranks."""
        self.ranks.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
        self.writing = self.thread.submit(self._write_shards, folder, shards, state)
        self.rewrite = functools.partial(self._begin_shards, folder, shards, state)

    def _await_shards(self) -> None:
        """Wait for the sharded checkpoint that was begun, if any. Raises OSError on all ranks."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def _write_shards(self, folder: Path, own: dict[str, Any], state: dict[str, Any]) -> None:
        """Write this rank's file; on rank 0 then the one that names all shards.

        What a rank raises, all do. They wait for each other however long it takes, in a group of
        their own, since the training goes on in the others.
        """
        ranks = self.ranks.for_thread()
        # A new name: state.pt may list the shards of an earlier save.
        path = folder / f"shard-{ranks.rank}-{secrets.token_hex(4)}.pt"
        try:
            digest = ranks.on_all(lambda: save_pt(path, own))
            shards = dict(ranks.gather((path.name, digest)))
            plain = state | {"model": {}, "optimizer": {}, "shards": shards}
            ranks.on_main(lambda: save_pt(folder / STATE_FILE, plain))
        finally:  # where that failed, too: the disk may be full
            ranks.on_main(lambda: remove_unlisted_shards(folder))
        ranks.on_main(lambda: self._note_written(folder, state))

    # ------------------------------------------------------------------------ what is kept

    def list_own(self, run_id: str) -> None:
        """Look which step checkpoints this run has: at its start, and after a rollback."""
        kept = self.ranks.on_main(lambda: self.folder.step_checkpoints(run_id))
        self.kept = kept if self.ranks.is_main else []

    def _note_written(self, path: Path, state: dict[str, Any]) -> None:
        """Prune, but not while updates are skipped: the last good checkpoint may be the oldest."""
        if self.ranks.is_main:
            if self.folder.is_step_checkpoint(path):
                self.kept = [other for other in self.kept if other != path] + [path]
            if not state["progress"]["skipped"]:
                self.prune()

    def prune(self) -> None:
        """Delete all but the newest `keep_last` step checkpoints of this run; 0 keeps all.

        Best effort: what cannot be deleted stays, and is tried again after the next save.
        """
        old = self.kept[: -self.keep_last] if self.keep_last else []
        for path in old:
            with contextlib.suppress(OSError):
                remove_checkpoint(path)
                self.kept.remove(path)
