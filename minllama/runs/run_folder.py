"""The folder of a run: its files' names, the lock on it, which checkpoint to resume, which to keep.

Runs of several options share a folder without touching each other's files. Knows nothing of how
the files are written, nor of what is in a model.
"""

from __future__ import annotations

import contextlib
import json
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import FLAGS, READERS
from minllama.cli.command_line import launch_command, own_script
from minllama.cli.config_file import recorded_words
from minllama.formats.pt_file import STATE_FILE
from minllama.machine.ranks import Ranks
from minllama.runs.checkpoints import (
    Summary,
    load_checkpoint,
    remove_unlisted_shards,
    summarize,
)
from minllama.system.errors import UsageError
from minllama.system.files import (
    check_writable,
    check_writable_file,
    read_json_object,
    real_path,
    remove,
    remove_temporaries,
    replace,
    write_text,
)
from minllama.system.locks import Busy, Lock, hold
from minllama.text.copies import Copies

CHECKPOINT_NAME = r"-(epoch|step)-\d+(\.pt|-sharded)"  # after the run's prefix
RUN_FILES = (
    "final-model.pt",
    "best-model.pt",
    "metrics.jsonl",
    "run.json",
    "loss-curve.svg",
    "report.html",
    "tensorboard",
    "profile.json.gz",
)
EARLIER_FILES = ("loss-curve.svg",)  # which earlier versions wrote
WRITTEN_WITH = {"tensorboard": "tensorboard", "profile.json.gz": "profile"}  # these flags
FLAGS_OF_A_START = {"option", "save_dir", "resume", "overwrite", "plan", "profile"}
# Of which the record has the outcome: the global batch, and the steps and sizes that it came to.
WITH_OUTCOME = {"gradient_accumulation_steps", "minutes"}
NOT_REPEATED = FLAGS_OF_A_START | WITH_OUTCOME | {"config"}
ABANDONED = ".abandoned"
Findings = dict[str, list[list[str]]]  # by a title, rows of a name and a text
CHECK_SECONDS = 1.0  # seconds between two checks whether the folder is still there


def files_written(options: dict[str, Any]) -> list[str]:
    """Those of RUN_FILES that a run with these options writes."""
    names = [name for name in RUN_FILES if name not in EARLIER_FILES]
    return [name for name in names if options.get(WRITTEN_WITH.get(name), True)]


def launch_of(start: dict[str, Any]) -> dict[str, int]:
    """How many processes and machines a start in run.json was of; 1 of what it does not say."""
    counts = {name: start.get(name) for name in ("processes", "machines")}
    return {name: count if type(count) is int else 1 for name, count in counts.items()}


def _is_table(rows: Any) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == 2 and all(isinstance(text, str) for text in row)
        for row in rows
    )


@dataclass
class RunFolder:
    """The files of one run: checkpoints `<prefix>-epoch-N.pt`, its models and its records.

    `prefix` names the option (`pretrain`) or the option and the data set (`finetune-sst`).
    """

    path: Path
    prefix: str
    lock: Lock | None = field(default=None, repr=False)  # on the rank that holds it
    checked_at: float = 0.0  # when it was last looked for, by the monotonic clock

    def file(self, name: str) -> Path:
        """A model or record by its plain name; pretraining's have no prefix."""
        return self.path / (name if self.prefix == "pretrain" else f"{self.prefix}-{name}")

    def own_files(self) -> list[Path]:
        """The files here that run.json lists, of this run or an earlier one of the same prefix."""
        starts = self.starts()
        listed = [start.get("files", RUN_FILES) for start in starts]  # earlier versions did not say
        names = [name for names in listed if isinstance(names, list | tuple) for name in names]
        files = [self.file(name) for name in RUN_FILES if name in names]
        return [file for file in files if file.exists()] + (self.checkpoints() if starts else [])

    def _files_in_the_way(self) -> list[Path]:
        """What has the name of a file of this run, whoever wrote it."""
        files = [self.file(name) for name in RUN_FILES if name not in EARLIER_FILES]
        return [file for file in files if file.exists()] + self.checkpoints()

    def checkpoints(self) -> list[Path]:
        """The resumable checkpoints that are complete, by their names."""
        return [
            p for p in self._named_as_checkpoints() if p.is_file() or (p / STATE_FILE).is_file()
        ]

    def _named_as_checkpoints(self, suffix: str = "") -> list[Path]:
        pattern = re.compile(re.escape(self.prefix) + CHECKPOINT_NAME + re.escape(suffix))
        return sorted(path for path in self.path.glob("*-*-*") if pattern.fullmatch(path.name))

    def epoch_checkpoint(self, epoch: int) -> Path:
        """The resumable checkpoint after `epoch` passes over the data."""
        return self.path / f"{self.prefix}-epoch-{epoch}.pt"

    def step_checkpoint(self, step: int) -> Path:
        """The resumable checkpoint after `step` optimizer steps."""
        return self.path / f"{self.prefix}-step-{step}.pt"

    # ------------------------------------------------------------------------ begin and end

    def check_writable(self) -> None:
        """Raise UsageError where the run's files, by their very names, cannot be written here."""
        check_writable(self.path, "--save_dir")
        longest = self.path / f"{self.prefix}-step-{10**9}-sharded"
        check_writable_file(longest, "--save_dir")

    @contextlib.contextmanager
    def locked(self, ranks: Ranks) -> Iterator[None]:
        """Keep other runs of this prefix out of the folder within the block.

        Rank 0 holds the lock, and the system frees it when that process ends, however it ends.
        Raises UsageError that names the run that is in the folder, and where the other ranks do
        not see the lock: they are on machines that do not share the folder.
        """
        path = self.file("run.lock")
        with contextlib.ExitStack() as held:
            content = ranks.on_main(lambda: self._hold(path, held))
            if ranks.nodes > 1:
                ranks.on_all(lambda: self._check_shared(path, content, ranks.node))
            try:
                yield
            except UsageError:  # refused before it was a run: nothing of it stays
                if ranks.is_main and not self.starts():
                    self.lock.remove()
                raise

    def _hold(self, path: Path, held: contextlib.ExitStack) -> str:
        try:
            self.lock = held.enter_context(hold(path))
        except Busy as holder:
            raise UsageError(
                f"--save_dir {self.path}: {holder} is running in it: wait for it or name another "
                "folder"
            ) from None
        except OSError as error:
            raise UsageError(f"{path}: cannot be written ({error.strerror})") from None
        return self.lock.content

    def missing_folder_error(self, *, now: bool = False) -> str | None:
        """What to say of a folder that was taken away while its run was in it, else None.

        Looks once a second, or `now`.
        """
        if self.lock is None or (not now and time.monotonic() - self.checked_at < CHECK_SECONDS):
            return None
        self.checked_at = time.monotonic()
        if not self.lock.is_gone():
            return None
        return (
            f"--save_dir {self.path}, or the {self.lock.path.name} in it, was removed, renamed or "
            "replaced while this run was in it"
        )

    def _check_shared(self, path: Path, content: str, node: int) -> None:
        for _ in range(100):  # a network file system shows it late
            with contextlib.suppress(OSError):
                if path.read_text(encoding="utf-8", errors="replace") == content:
                    return
            time.sleep(0.1)
        raise UsageError(
            f"--save_dir {self.path}: machine {node} ({platform.node()}) does not see what rank 0 "
            "wrote there: name a folder that all machines share"
        )

    def check_free(self, *, resume: bool, overwrite: bool, model: Path | None = None) -> None:
        """Raise UsageError where the folder holds a run that is neither resumed nor removed.

        Also where `model`, the file or the run's folder to start from, would be removed with it,
        and where a file is in the way that run.json does not list: it is the user's.
        """
        present, own = self._files_in_the_way(), self.own_files()
        removed = map(real_path, (*present, self.path))
        if overwrite and model and real_path(model) in removed:
            raise UsageError(
                f"--overwrite would remove --pretrained_model_path {model} with the run in "
                f"{self.path}: name another --save_dir"
            )
        others = [path for path in present if path not in own]
        if others and not resume:
            raise UsageError(
                f"--save_dir {self.path}: {others[0]} has the name of a run's file, and no "
                "run.json there lists it as one: move it, or name another --save_dir"
            )
        if present and not resume and not overwrite:
            raise UsageError(
                f"--save_dir {self.path} already holds a run ({present[0].name}): add --resume "
                "auto to continue it, --overwrite to remove its files, or name another folder"
            )

    def clear(self) -> None:
        """Remove the files of an earlier run, and no others."""
        abandoned = self._named_as_checkpoints(ABANDONED) if self.starts() else []
        record = self.file("run.json")  # last: killed before, the rest would be nobody's
        for path in sorted([*self.own_files(), *abandoned], key=lambda path: path == record):
            remove(path)

    def remove_incomplete(self) -> None:
        """Delete what runs of this prefix left that were killed while they wrote."""
        names = [re.escape(self.file(name).name) for name in RUN_FILES]
        names.append(re.escape(self.prefix) + CHECKPOINT_NAME)
        remove_temporaries(self.path, "|".join(names))
        for path in self._named_as_checkpoints():
            if path.is_dir():
                remove_unlisted_shards(path)

    def add_start(self, record: dict[str, Any]) -> None:
        """Add one start of the run, the first or a resume, to run.json."""
        path, starts = self.file("run.json"), self.starts()
        if not starts and path.exists():
            replace(path, path.with_name(f"{path.name}.damaged"))
            print(f"note: {path} was damaged; it is kept as {path.name}.damaged")
        self._write_record({"starts": [*starts, record], "copies": None, "findings": None})

    def name_result(self, name: str, schedule_steps: int) -> None:
        """Say in run.json which of its models is the run's result: later commands take that one.

        And how many steps its schedule came to, which --minutes decides while it trains.
        """
        self._write_record({"result": self.file(name).name, "schedule_steps": schedule_steps})

    def note_copies(self, copies: Copies) -> None:
        """Add to run.json how much the run's result copies from its text."""
        self._write_record({"copies": copies.to_plain()})

    def copies(self) -> Copies | None:
        """What run.json says of that; None where it does not, or the run has gone on since."""
        return Copies.from_plain(self._record().get("copies"))

    def note_findings(self, findings: Findings) -> None:
        """Add to run.json what was found of the run's result, beside what is there."""
        self._write_record({"findings": self.findings() | findings})

    def findings(self) -> Findings:
        """What run.json says of that; what is damaged is left out."""
        found = self._record().get("findings")
        tables = found.items() if isinstance(found, dict) else ()
        return {title: rows for title, rows in tables if _is_table(rows)}

    def starts(self) -> list[dict[str, Any]]:
        """The starts in run.json; none where there is no such file, or it is damaged."""
        return self._record().get("starts", [])

    def typed(self) -> set[str] | None:
        """The names of the flags that were typed at the first start; None where it is not known."""
        typed = next((start.get("typed") for start in self.starts()), None)
        return {*filter(FLAGS.__contains__, map(str, typed))} if isinstance(typed, list) else None

    def _record(self) -> dict[str, Any]:
        with contextlib.suppress(UsageError):
            record = read_json_object(self.file("run.json"))
            starts = record.get("starts")
            if isinstance(starts, list) and all(isinstance(start, dict) for start in starts):
                return record
        return {}

    def _write_record(self, changes: dict[str, Any]) -> None:
        changed = (self._record() | changes).items()
        content = {name: value for name, value in changed if value is not None}
        write_text(self.file("run.json"), json.dumps(content, indent=2) + "\n")

    def repeating_words(self, changes: dict[str, Any] | None = None) -> list[str]:
        """The command, from --option on, that repeats the run's first start in a new folder.

        What the program chose then is typed now; not so with `changes`, options with other values,
        of which the choices may be others. Empty without a record; raises UsageError for a damaged
        one.
        """
        stored = next((start.get("options") for start in self.starts()), None)
        option = stored.get("option") if isinstance(stored, dict) else None
        if option not in READERS["option"]:
            return []
        if stored.get("minutes") is not None and self._record().get("schedule_steps") is not None:
            stored = stored | {"schedule_steps": self._record()["schedule_steps"]}
        names = FLAGS.keys() - NOT_REPEATED
        if changes is not None:
            stored, typed = stored | changes, self.typed()
            if typed is None:  # a record of an earlier version
                names |= {"minutes"}
            else:
                names = (names | WITH_OUTCOME) & (typed | {*changes})
        fields = {
            name: field
            for name, field in FLAGS.items()
            if option in READERS[name] and name in names
        }
        words = recorded_words(stored, fields, where=str(self.file("run.json")))
        folder = self.path.parent / f"{Path(real_path(self.path)).name}-again"  # "." has no name
        return ["--option", option, "--save_dir", str(folder), *words]

    def repeating_command(self, changes: dict[str, Any] | None = None) -> str | None:
        """The command of `repeating_words`, by as many processes as the run was; None without."""
        words, start = self.repeating_words(changes), next(iter(self.starts()), {})
        return launch_command(own_script(), *words, **launch_of(start)) if words else None

    # ------------------------------------------------------------------------ checkpoints

    def find_checkpoint(self, resume: str) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint that `--resume` names, read and verified.

        auto: that of the latest step that is whole; what is skipped is said. None where there is
        none yet. Raises UsageError where all are damaged.
        """
        if resume != "auto":
            summarize(Path(resume))
            return Path(resume), load_checkpoint(Path(resume))
        for path, _ in self._newest_first():
            try:
                return path, load_checkpoint(path)
            except UsageError as error:
                print(f"skipped: {error}")
        if self.checkpoints():
            raise UsageError(
                f"--resume auto: no whole {self.prefix} checkpoint in {self.path}; start without "
                "it, with --overwrite"
            )
        return None

    def last_good(self, run_id: str, step: int) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint of a run before `step` that followed no skipped update."""
        for path, of in self._newest_first(run_id):
            if of.step < step and not of.skipped:
                with contextlib.suppress(UsageError):
                    return path, load_checkpoint(path)
        return None

    def set_aside_later(self, run_id: str, step: int) -> None:
        """Rename the run's checkpoints after `step`, where a run resumed there leaves them.

        Else `--resume auto` would return to a future that was given up.
        """
        later = [path for path, of in self._newest_first(run_id) if of.step > step]
        for path in later:
            aside = path.with_name(path.name + ABANDONED)
            if aside.exists():  # by an earlier resume, at the same step
                remove(aside)
            replace(path, aside)
        if later:
            names = ", ".join(path.name for path in later)
            print(f"set aside    {names}, made after step {step:,}: renamed to *.abandoned")

    def is_step_checkpoint(self, path: Path) -> bool:
        """Whether a checkpoint is one of those that are kept for a while, not of an epoch's end."""
        return path.name.startswith(f"{self.prefix}-step-")

    def step_checkpoints(self, run_id: str) -> list[Path]:
        """The step checkpoints that a run wrote, oldest first."""
        own = [path for path, _ in self._newest_first(run_id) if self.is_step_checkpoint(path)]
        return own[::-1]

    def _newest_first(self, run_id: str | None = None) -> list[tuple[Path, Summary]]:
        """The checkpoints of a run, by default of all, that are sound enough to tell their step."""
        found = []
        for path in self.checkpoints():
            try:
                of = summarize(path)
                if run_id in (None, of.run_id):
                    found.append((path, of))
            except UsageError as error:
                if run_id is None:
                    print(f"skipped: {error}")
        # Of two of the same step the one whose record is complete is the later.
        return sorted(found, key=lambda pair: (pair[1].step, pair[1].complete), reverse=True)
