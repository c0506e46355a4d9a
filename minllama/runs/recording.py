"""Where the records of a run go while it trains: metrics.jsonl, report.html, TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minllama.runs.record import MetricsLog
from minllama.runs.report import Report
from minllama.runs.run_folder import RunFolder

# By the names that other programs give them.
BOARD_NAMES = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "val_loss": "val/loss",
    "val_perplexity": "val/perplexity",
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


class Recording:
    """Takes a run's records, each step's once, also over resumes; on leaving it the run has ended.

    `state` is how, in a word, unless it is by an error.
    """

    def __init__(
        self,
        folder: RunFolder,
        done: int,
        *,
        last_step: Callable[[], int],
        window: int,
        tensorboard: bool,
        save: Callable[[Path, Callable[[], None]], None],
    ) -> None:
        """Continue after the step `done` of the run's `last_step()`.

        The last `window` records stay at hand; `save(path, write)` writes a file that the run can
        do without for a while.
        """
        self.state = "finished"
        self.log = MetricsLog(folder.file("metrics.jsonl"), done, window=window)
        self.opened = time.perf_counter() - self.log.elapsed()
        self.followers: list[Report | TensorBoard] = [Report(folder, done, last_step, save)]
        if tensorboard:
            self.followers.append(TensorBoard(folder.file("tensorboard"), done))

    @property
    def records(self) -> Sequence[dict[str, Any]]:
        """The last ones."""
        return self.log.records

    def append(self, record: dict[str, Any]) -> None:
        """Take a step's record, and add to it the seconds trained so far over all starts."""
        record["elapsed"] = round(time.perf_counter() - self.opened, 3)
        for part in (self.log, *self.followers):
            part.append(record)

    def rewind(self, last_step: int) -> None:
        """Take back what came after `last_step`: those steps are made again."""
        for part in (self.log, *self.followers):
            part.rewind(last_step)

    def sync(self) -> None:
        """Flush to the disk: before a checkpoint, which must not know of lost records."""
        for part in (self.log, *self.followers):
            part.sync()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        self.log.close()
        for follower in self.followers:
            follower.close(self.state if error is None else "ended by an error")


class NoRecording:
    """That of the ranks that record nothing."""

    state = ""
    records: Sequence[dict[str, Any]] = ()

    def append(self, *_: Any) -> None:
        """Do nothing: rank 0 does it."""

    rewind = sync = __exit__ = append

    def __enter__(self) -> NoRecording:
        return self


class TensorBoard:
    """Event files for TensorBoard, which shows each step once, also over resumes."""

    def __init__(self, folder: Path, last_step: int) -> None:
        self.folder, self.writer = folder, None
        self.rewind(last_step)

    def rewind(self, last_step: int) -> None:
        """Begin another file, which tells TensorBoard to forget the steps after `last_step`."""
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self._try(lambda: self._open(SummaryWriter, last_step))

    def _open(self, summary_writer: type, last_step: int) -> None:
        self.writer = summary_writer(str(self.folder), purge_step=last_step + 1)

    def append(self, record: dict[str, Any]) -> None:
        """Add a step's figures, and the sample as text."""
        self._try(lambda: self._add(record))

    def _add(self, record: dict[str, Any]) -> None:
        if self.writer is None:
            return
        step = record["step"]
        for name, shown in BOARD_NAMES.items():
            if record.get(name) is not None:
                self.writer.add_scalar(shown, record[name], step)
        if "sample" in record:
            self.writer.add_text("sample", record["sample"], step)

    def sync(self) -> None:
        """Write what waits in memory."""
        if self.writer is not None:
            self._try(self.writer.flush)

    def close(self, state: str = "") -> None:
        """Write and close the file."""
        writer, self.writer = self.writer, None
        if writer is not None:
            self._try(writer.close)

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:  # of a full disk: the thread that writes has then ended
            self.writer = None
            tqdm.write(f"warning: {self.folder}: no more is written there ({error})")
