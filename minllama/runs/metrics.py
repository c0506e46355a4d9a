"""A run's records, one a step: written as they come, and read again.

Knows records as plain dicts, and nothing of how a step is made.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from minllama.cli.console import by_source
from minllama.runs.report import Curves, number, write_report
from minllama.runs.run_folder import Findings, RunFolder
from minllama.system.files import open_regular
from minllama.text.copies import Copies

LINE_BYTES = 1 << 20  # read at once; a record's line is shorter
# That the program computes with.
FIGURES = ("step", "loss", "val_loss", "val_perplexity", "old_val_loss", "elapsed")
REWRITE_SECONDS = 10  # between two writings of the page, which take at most 1 % of the time
RELOAD_SECONDS = 15  # of the page in a browser
# By the names that other programs give them.
BOARD_NAMES = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "val_loss": "val/loss",
    "val_perplexity": "val/perplexity",
    "old_val_loss": "val/loss_of_old_text",
    "old_val_perplexity": "val/perplexity_of_old_text",
    "bits_per_byte": "val/bits_per_byte",
    "dev_accuracy": "dev/accuracy",
    "dev_f1": "dev/f1",
    "lr": "lr",
    "mfu": "mfu",
    "tokens_per_second": "tokens_per_second",
    "memory": "memory",
    "gpu_power_watts": "gpu/power_watts",
    "gpu_utilization": "gpu/utilization",
    "gpu_memory_used": "gpu/memory_used",
}

# ---------------------------------------------------------------------------- writing


class Metrics:
    """Writes a run's records to metrics.jsonl, report.html and TensorBoard, each step's once.

    Enabled on rank 0; elsewhere it does nothing. On leaving it the report says how the run ended:
    as `state`, or "ended by an error". Of a long run only thinned curves stay in memory.
    """

    def __init__(
        self,
        folder: RunFolder,
        done: int,
        *,
        last_step: Callable[[], int],
        save: Callable[[Path, Callable[[], None]], None],
        tensorboard: bool = False,
        enabled: bool = True,
    ) -> None:
        """Continue after step `done` of a run that is to end after `last_step()`.

        `save(path, write)` writes the report, and does not raise where the disk is full.
        """
        self.folder, self.last_step, self.save = folder, last_step, save
        self.tensorboard, self.enabled = tensorboard, enabled
        self.state = "finished"
        self.path = folder.file("metrics.jsonl")
        self.file: BinaryIO | None = None
        self.board: Any = None  # TensorBoard's writer
        self.unwritten: list[dict[str, Any]] = []  # records that the disk did not take
        self.trained = 0.0  # seconds, over all starts, as of the last record read
        self.rewind(done)
        self.opened = time.perf_counter() - self.trained

    def append(self, record: dict[str, Any]) -> None:
        """Take a step's record, and add to it the seconds trained so far over all starts."""
        if not self.enabled:
            return
        record["elapsed"] = round(time.perf_counter() - self.opened, 3)
        self.unwritten.append(record)
        self._write()
        self._add_to_board(record)
        self.curves.add(record)
        started = time.monotonic()
        if started >= self.page_due:
            self._save_page("running", reload=RELOAD_SECONDS)
            now = time.monotonic()
            self.page_due = now + max(REWRITE_SECONDS, 100 * (now - started))

    def rewind(self, last_step: int) -> None:
        """Take back the records after `last_step`: those steps are computed again."""
        if not self.enabled:
            return
        self._close_file()
        self.curves, self.page_due = Curves(), 0.0
        self.end, count, written = 0, 0, 0  # `end`: of the lines that stay, in bytes
        for record, end in _whole_records(self.path):
            if written < record["step"] <= last_step:
                self.curves.add(record)
                self.trained = max(0.0, record.get("elapsed") or 0.0)
                self.end, count, written = end, count + 1, record["step"]
        self.unwritten = [r for r in self.unwritten if written < r["step"] <= last_step]
        for record in self.unwritten:
            self.curves.add(record)
        lost = last_step - count - len(self.unwritten)
        if lost:
            tqdm.write(f"note: {self.path} lacks {lost:,} of {last_step:,} steps, lost or damaged")
        self._write()
        self._open_board(last_step)

    def sync(self) -> None:
        """Flush to the disk: before a checkpoint, which must not know of lost records."""
        if self.file is not None:
            try:
                os.fsync(self.file.fileno())
            except OSError as error:
                tqdm.write(f"warning: {self.path} was not flushed to the disk ({error})")
        with self._board_errors():
            if self.board is not None:
                self.board.flush()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if self.enabled:
            self._close_file()
            self._save_page(self.state if error is None else "ended by an error")
            self._close_board()

    # ------------------------------------------------------------------------ metrics.jsonl

    def _write(self) -> None:
        """Hand the new lines to the system at once, so that they outlive the process.

        What the disk does not take stays in memory, and the next record brings it along.
        """
        data = "".join(json.dumps(record) + "\n" for record in self.unwritten).encode()
        try:
            if self.file is not None and not self._is_in_place():
                self._close_file()
                self.end = self.path.stat().st_size if self.path.exists() else 0
                tqdm.write(
                    f"warning: {self.path} was removed, renamed or replaced: what it held "
                    "is not in the new one"
                )
            if self.file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
                flags |= getattr(os, "O_NOFOLLOW", 0)  # a link that somebody left is not followed
                self.file = os.fdopen(os.open(self.path, flags, 0o666), "ab")
                self.file.truncate(self.end)  # cuts off what a failed write or a crash left
            self.file.write(data)
            self.file.flush()
        except OSError as error:
            self._close_file()
            tqdm.write(f"warning: {self.path} was not written ({error}); the run continues")
        else:
            self.end += len(data)
            self.unwritten.clear()

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def _close_file(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # closing flushes: a full disk fails again here
                self.file.close()
        self.file = None

    # ------------------------------------------------------------------------ report.html

    def _save_page(self, state: str, *, reload: int | None = None) -> None:
        status = {"state": state, "last_step": self.last_step(), "reload": reload}
        path = self.folder.file("report.html")
        self.save(path, lambda: write_report(self.folder, self.curves, **status))

    # ------------------------------------------------------------------------ TensorBoard

    def _open_board(self, last_step: int) -> None:
        """Begin another event file, which tells TensorBoard to forget steps after `last_step`."""
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._close_board()
            with self._board_errors():
                folder = str(self.folder.file("tensorboard"))
                self.board = SummaryWriter(folder, purge_step=last_step + 1)

    def _add_to_board(self, record: dict[str, Any]) -> None:
        if self.board is None:
            return
        with self._board_errors():
            for name, board_name in BOARD_NAMES.items():
                if record.get(name) is not None:
                    self.board.add_scalar(board_name, record[name], record["step"])
            for name, source, value in by_source(record):
                if value is not None:
                    self.board.add_scalar(f"{BOARD_NAMES[name]}/{source}", value, record["step"])
            if "sample" in record:
                self.board.add_text("sample", record["sample"], record["step"])

    def _close_board(self) -> None:
        board, self.board = self.board, None
        if board is not None:
            with self._board_errors():
                board.close()

    @contextlib.contextmanager
    def _board_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # of a full disk: the thread that writes has then ended
            self.board = None
            path = self.folder.file("tensorboard")
            tqdm.write(f"warning: {path}: no more is written there ({error})")


def add_findings(
    folder: RunFolder, findings: Findings, copies: Copies | None = None, *, last_step: int
) -> None:
    """Put what was found of a finished run's result into its record and its page."""
    try:
        if copies is not None:
            folder.note_copies(copies)
        folder.note_findings(findings)
        curves = Curves(read_records(folder.file("metrics.jsonl")))
        write_report(folder, curves, state="finished", last_step=last_step, reload=None)
    except OSError as error:
        tqdm.write(f"warning: {folder.file('report.html')} was not written again ({error})")


# ---------------------------------------------------------------------------- reading


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file, one by one; damaged lines are left out."""
    return (record for record, _ in _whole_records(path))


def _whole_records(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The records of a metrics file, each with the byte offset of its end.

    Raises UsageError for what is not a regular file: opening a pipe would wait for ever.
    """
    end = 0
    if not path.exists():
        return
    with open_regular(path) as file:
        for line in iter(lambda: file.readline(LINE_BYTES), b""):
            end += len(line)
            record = None
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line) if line.endswith(b"\n") else None  # else cut by a crash
            if is_sound(record):
                yield record, end


def is_sound(record: Any) -> bool:
    """Whether this is a step's record, whose figures can be computed with."""
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return False
    figures = [record.get(name) for name in FIGURES]
    return all(figure is None or number(figure) is not None for figure in figures)


def finite_or_none(value: float | dict[str, float]) -> float | dict | None:
    """The value, or each in a dict, as JSON can hold it, which has no NaN."""
    if isinstance(value, dict):
        return {name: finite_or_none(item) for name, item in value.items()}
    return value if math.isfinite(value) else None
