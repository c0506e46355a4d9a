"""Several runs compared: a table, a CSV file, and a page of their curves."""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import FLAGS, READERS
from minllama.cli.chinese import columns_of
from minllama.cli.command_line import printable
from minllama.cli.console import human_time
from minllama.runs.metrics import read_records
from minllama.runs.report import Curves, describe_run, number, page, plain_text
from minllama.runs.run_folder import FLAGS_OF_A_START, RunFolder
from minllama.system.errors import UsageError

MOST_BESIDE = 5  # flags that differ, as columns beside the figures
RECENT_STEPS = 20  # whose mean is the training loss at the end
NOT_COMPARED = FLAGS_OF_A_START | {"cache_dir", "config", "lang", "tensorboard"}
BEST = {"val_loss": min, "bits_per_byte": min, "dev_accuracy": max}
HEADS = {  # of the table's columns of figures
    "best_val_loss": "val loss",
    "best_bits_per_byte": "bits/byte",
    "best_dev_accuracy": "accuracy",
    "train_loss": "train loss",
    "best_step": "at step",
    "steps": "steps",
    "tokens": "tokens",
    "seconds": "time",
}
# What losses are of: its name in run.json, how to say that it differs, and what then compares.
DATA = (
    ("text", "different texts to train on", "that may be why one loss is lower"),
    ("held_out", "different held-out text", "neither losses nor bits per byte compare"),
    ("vocabulary", "different vocabularies", "losses, which are per token, do not compare"),
)


@dataclass
class Run:
    """A run as it is compared."""

    name: str
    curves: Curves
    starts: list[dict[str, Any]]
    folder: RunFolder
    figures: dict[str, float | int | None] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """Its flags, as of its last start; none where there is no record of them."""
        options = self.starts[-1].get("options") if self.starts else None
        return options if isinstance(options, dict) else {}

    def data(self, name: str) -> str | None:
        """What the record says of its text, held-out text or vocabulary; None: it does not."""
        data = self.starts[-1].get("data") if self.starts else None
        value = data.get(name) if isinstance(data, dict) else None
        return printable(value) if isinstance(value, str) else None


def read_run(path: Path) -> Run:
    """A run, by its folder or metrics file. Raises UsageError for a path without one."""
    metrics = find_metrics(path)
    prefix = metrics.name.removesuffix("metrics.jsonl").removesuffix("-")
    folder = RunFolder(metrics.parent, prefix or "pretrain")
    run = Run(printable(str(path)), Curves(), folder.starts(), folder)
    best: dict[str, Any] = dict.fromkeys(BEST)
    losses: deque[float] = deque(maxlen=RECENT_STEPS)
    last: dict[str, Any] = {}
    best_step = None
    for record in read_records(metrics):
        run.curves.add(record)
        last = record
        if (loss := finite(record, "loss")) is not None:
            losses.append(loss)
        for name, better in BEST.items():
            value, before = finite(record, name), best[name]
            if value is not None and (before is None or better(value, before) != before):
                best[name] = value
                best_step = record["step"] if name != "bits_per_byte" else best_step
    if not last:
        raise UsageError(f"{metrics}: holds no records of steps")
    run.figures = {f"best_{name}": value for name, value in best.items()} | {
        "train_loss": sum(losses) / len(losses) if losses else None,
        "best_step": best_step,
        "steps": last["step"],
        "tokens": finite(last, "tokens"),
        "seconds": finite(last, "elapsed"),
    }
    return run


def finite(record: dict[str, Any], name: str) -> int | float | None:
    """A figure of a record as it is; None for what is no finite number."""
    value = record.get(name)
    return None if number(value) is None else value


def find_metrics(path: Path) -> Path:
    """The metrics of a run, given its folder or the file itself. Raises UsageError."""
    if path.is_file() and path.name.endswith("metrics.jsonl"):
        return path
    files = sorted(path.glob("*metrics.jsonl")) if path.is_dir() else []
    files = [file for file in files if file.name == "metrics.jsonl"] or files
    if not files:
        problem = "holds no run (no metrics.jsonl)" if path.is_dir() else "no such folder of a run"
        raise UsageError(f"{path}: {problem}")
    if len(files) > 1:
        raise UsageError(f"{path}: holds several runs; name one of {', '.join(map(str, files))}")
    return files[0]


# ---------------------------------------------------------------------------- what differs


def differing_flags(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The flags that are not the same in all runs, each with its value in every run."""
    options = {run.options.get("option") for run in runs}
    rows = {}
    for name in FLAGS:
        known = {plain_text(run.options[name]) for run in runs if name in run.options}
        is_read = options & {*READERS[name]}
        if name not in NOT_COMPARED and is_read and len(known) > 1:
            rows[f"--{name}"] = [plain_text(run.options.get(name, "unknown")) for run in runs]
    return rows


def warnings(runs: Sequence[Run]) -> list[str]:
    """In which of what losses are of the runs differ, or may: then they do not compare."""
    lines = []
    for name, differ, then in DATA:
        values = [run.data(name) for run in runs]
        known = {value for value in values if value is not None}
        if len(known) > 1:
            of = "; ".join(f"{run.name}: {value}" for run, value in zip(runs, values, strict=True))
            lines.append(f"these runs have {differ}: {then} ({of})")
        elif known and None in values:
            unknown = ", ".join(run.name for run, v in zip(runs, values, strict=True) if v is None)
            lines.append(f"whether these runs have {differ} is not on record of {unknown}")
    if all(run.data("text") is None for run in runs):
        lines.append("these runs do not say of which text they are: see that it is the same")
    return lines


def sorted_runs(runs: Sequence[Run]) -> list[Run]:
    """The best run first, where they can be compared; else as they are."""

    def is_same(*names: str) -> bool:
        return all(len({run.data(name) for run in runs}) == 1 for name in names)

    for key, names in (
        ("best_dev_accuracy", ("held_out",)),
        ("best_bits_per_byte", ("held_out",)),
        ("best_val_loss", ("held_out", "vocabulary")),
    ):
        if is_same(*names) and all(run.figures[key] is not None for run in runs):
            sign = -1 if key == "best_dev_accuracy" else 1
            return sorted(runs, key=lambda run: sign * run.figures[key])
    return list(runs)


# ---------------------------------------------------------------------------- shown


def table(runs: Sequence[Run]) -> list[str]:
    """Lines of a table: a row for each run, its figures and the flags that differ.

    Of many flags each has a row of its own below.
    """
    heads = [key for key in HEADS if any(run.figures[key] is not None for run in runs)]
    flags = differing_flags(runs)
    beside = flags if len(flags) <= MOST_BESIDE else {}
    rows = [["run", *(HEADS[key] for key in heads), *beside]]
    for place, run in enumerate(runs):
        figures = [_shown(key, run.figures[key]) for key in heads]
        rows.append([run.name, *figures, *(values[place] for values in beside.values())])
    lines = _aligned(rows, numbers=len(heads))
    if flags and not beside:
        below = [["flag", *(run.name for run in runs)]]
        lines += ["", *_aligned(below + [[flag, *values] for flag, values in flags.items()])]
    return lines


def _aligned(rows: list[list[str]], *, numbers: int = 0) -> list[str]:
    """Rows as lines, the columns below each other; so many behind the first one are numbers."""
    widths = [max(map(columns_of, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        gaps = [" " * (width - columns_of(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [
            gap + cell if 0 < place <= numbers else cell + gap
            for place, (cell, gap) in enumerate(zip(row, gaps, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _shown(key: str, value: float | int | None) -> str:
    if value is None:
        return "-"
    if key == "seconds":
        return human_time(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


def as_csv(runs: Sequence[Run]) -> str:
    """The table as a CSV file, with what the runs are of."""
    flags, text = differing_flags(runs), io.StringIO(newline="")
    names = [name for name, *_ in DATA]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *HEADS, *names, *flags])
    for place, run in enumerate(runs):
        figures = ["" if run.figures[key] is None else run.figures[key] for key in HEADS]
        data = [run.data(name) or "" for name in names]
        writer.writerow([run.name, *figures, *data, *(v[place] for v in flags.values())])
    return text.getvalue()


def page_of(runs: Sequence[Run]) -> str:
    """A page of the runs' curves laid over each other, with what is to be said of them."""
    described = [
        describe_run(r.name, r.curves, r.starts, r.folder.copies(), r.folder.findings())
        for r in runs
    ]
    title = " and ".join(run["name"] for run in described)
    return page(title, described, notes=warnings(runs))
