"""A run as one page: its curves, samples, plan, choices and environment, for any browser.

The page holds everything it needs, asks no network for anything, and is rewritten while the run
lasts. Knows a run by its records and what run.json says of its starts.
"""

from __future__ import annotations

import html
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from config import FLAGS
from minllama.cli.command_line import quoted
from minllama.cli.console import EVALUATED
from minllama.runs.record import read_records
from minllama.runs.run_folder import RunFolder
from minllama.system.errors import UsageError
from minllama.system.files import write_text

PAGE = Path(__file__).parent / "page"  # the page's own text, and uPlot, which draws the curves
MOST_POINTS = 2000  # of a curve
MOST_SAMPLES, SAMPLE_LENGTH = 100, 4000  # texts, characters
REWRITE_SECONDS = 10  # at most that often, and for at most a hundredth of the time
RELOAD_SECONDS = 15
PLACES = ("step", "tokens", "elapsed")  # what curves are drawn over
MEASURED = (
    *("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory"),
    *("gpu_memory_used", "gpu_power_watts", "gpu_utilization"),
)
ENVIRONMENT = ("device", "dtype", "processes", "resumed_at_step")  # of a start, and all its own

# ---------------------------------------------------------------------------- curves


def number(value: Any) -> int | float | None:
    """A number as a curve can hold it; None for anything else that a record may have."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not abs(value) < 2**63 or not math.isfinite(value):  # the first: an int too large to be one
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


class Curves:
    """The records of a run, thinned while they come, however many they are.

    Where there are more than MOST_POINTS, each point is the mean of `stride` steps, a power of two,
    and stands at the last of them. Of evaluations and samples every second one is dropped then.
    """

    def __init__(self, records: Iterable[dict[str, Any]] = ()) -> None:
        self.stride = 1
        self.points: list[dict[str, list]] = []  # for each name: sum and count, or the last value
        self.evaluations: list[dict[str, Any]] = []
        self.samples: list[tuple[int, str]] = []
        for record in records:
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        """Take in the next step's record; one that is no later step is left out."""
        place = {name: number(record.get(name)) for name in PLACES}
        step = place["step"]
        if not isinstance(step, int) or step <= (self.points[-1]["step"] if self.points else 0):
            return
        sums = {name: number(record.get(name)) for name in MEASURED}
        point = place | {name: (value or 0, value is not None) for name, value in sums.items()}
        self._append(point)
        if len(self.points) > MOST_POINTS:
            self.stride *= 2
            points, self.points = self.points, []
            for point in points:
                self._append(point)
        found = {name: number(record.get(name)) for name in EVALUATED}
        if any(value is not None for value in found.values()):
            self.evaluations = thinned([*self.evaluations, place | found], MOST_POINTS)
        if isinstance(record.get("sample"), str):
            sample = (step, record["sample"][:SAMPLE_LENGTH])
            self.samples = thinned([*self.samples, sample], MOST_SAMPLES)

    def _append(self, point: dict[str, Any]) -> None:
        if self.points and self._group(self.points[-1]) == self._group(point):
            earlier = self.points.pop()
            for name in MEASURED:
                point[name] = tuple(map(sum, zip(earlier[name], point[name], strict=True)))
        self.points.append(point)

    def _group(self, point: dict[str, Any]) -> int:
        return (point["step"] - 1) // self.stride

    def to_plain(self) -> dict[str, Any]:
        """The curves as columns."""
        steps: dict[str, list] = {name: [point[name] for point in self.points] for name in PLACES}
        for name in MEASURED:
            pairs = [point[name] for point in self.points]
            steps[name] = [number(total / count) if count else None for total, count in pairs]
        names = (*PLACES, *EVALUATED)
        return {
            "stride": self.stride,
            "steps": steps,
            "evaluations": {name: [found[name] for found in self.evaluations] for name in names},
            "samples": self.samples,
        }


def thinned(items: list, most: int) -> list:
    """At most `most` of the items, the last among them: without every second one if too many."""
    return items if len(items) <= most else items[::-2][::-1]


# ---------------------------------------------------------------------------- the page


def describe_run(name: str, curves: Curves, starts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A run as the page has it, by its records and its starts in run.json."""
    start = starts[-1] if starts else {}
    options, environment, plan = (
        start.get(key) if isinstance(start.get(key), kind) else kind()
        for key, kind in (("options", dict), ("environment", dict), ("plan", list))
    )
    choices = {
        flag: options[flag]
        for flag, field in FLAGS.items()
        if flag in options and options.get("option") in field.metadata["read_by"]
    }
    defaults = {flag: plain_text(field.default) for flag, field in FLAGS.items()}
    command = environment.get("command")
    return {
        "name": name,
        **curves.to_plain(),
        "plan": list(map(str, plan)),
        "choices": [(f"--{flag}", plain_text(value)) for flag, value in choices.items()],
        "changed": [f"--{f}" for f, value in choices.items() if plain_text(value) != defaults[f]],
        "command": quoted("python", *map(str, command)) if isinstance(command, list) else "",
        "environment": [
            (key.replace("_", " "), plain_text(value))
            for key, value in (environment | {k: start.get(k) for k in ENVIRONMENT}).items()
            if key != "command" and value is not None
        ],
    }


def plain_text(value: Any) -> str:
    """A flag's value as a person reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value in ((), []):
        return "unset"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return value.as_posix() if isinstance(value, Path) else str(value)


def page(title: str, runs: Sequence[dict[str, Any]], *, reload: int | None = None) -> str:
    """One self-contained HTML page of runs, which loads itself again every `reload` seconds."""
    title = title.encode("utf-8", "replace").decode()  # a path may hold what is no character
    data = {"title": title, "written": time.time(), "reload": reload, "runs": runs}
    # As JSON in a script element, where a text's own </script> must not end it.
    encoded = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "TITLE": html.escape(title),
        "DATA": encoded,
        "UPLOT_CSS": read_part("uPlot.min.css"),
        "UPLOT_JS": read_part("uPlot.iife.min.js"),
    }
    # In one pass: what a run's text has of such names stays text.
    return re.sub("@@([A-Z_]+)@@", lambda name: parts[name[1]], read_part("report.html"))


def read_part(name: str) -> str:
    """A part of the page that never changes."""
    return (PAGE / name).read_text(encoding="utf-8")


class Report:
    """report.html of a run that is training, written again while it does."""

    def __init__(
        self,
        folder: RunFolder,
        done: int,
        last_step: Callable[[], int],
        save: Callable[[Path, Callable[[], None]], None],
    ) -> None:
        """Continue after the step `done`; `save(path, write)` is what writes the page."""
        self.folder, self.last_step, self.save = folder, last_step, save
        self.rewind(done)

    def rewind(self, last_step: int) -> None:
        """Show what is on record up to `last_step`: the steps after it are made again."""
        records = read_records(self.folder.file("metrics.jsonl"))
        self.curves = Curves(record for record in records if record["step"] <= last_step)
        self.due = 0.0

    def append(self, record: dict[str, Any]) -> None:
        """Take in a step's record, and write the page where the last one is old enough."""
        self.curves.add(record)
        started = time.monotonic()
        if started >= self.due:
            self._save("running", reload=RELOAD_SECONDS)
            now = time.monotonic()
            self.due = now + max(REWRITE_SECONDS, 100 * (now - started))

    def sync(self) -> None:
        """Do nothing: the page can be made again from the metrics."""

    def close(self, state: str) -> None:
        """Write the page of a run that has ended as `state` says."""
        self._save(state)

    def _save(self, state: str, *, reload: int | None = None) -> None:
        def write() -> None:
            title = str(self.folder.path)
            run = describe_run(title, self.curves, self.folder.starts())
            run |= {"state": state, "last_step": self.last_step()}
            write_text(path, page(title, [run], reload=reload))

        path = self.folder.file("report.html")
        self.save(path, write)


# ---------------------------------------------------------------------------- several runs


def compare_runs(paths: Sequence[Path]) -> str:
    """A page of several runs laid over each other. Raises UsageError for a path without a run."""
    runs = []
    for path in paths:
        metrics = find_metrics(path)
        prefix = metrics.name.removesuffix("metrics.jsonl").removesuffix("-")
        starts = RunFolder(metrics.parent, prefix or "pretrain").starts()
        runs.append(describe_run(str(path), Curves(read_records(metrics)), starts))
        if not runs[-1]["steps"]["step"]:
            raise UsageError(f"{metrics}: holds no records of steps")
    return page(" and ".join(run["name"] for run in runs), runs)


def find_metrics(path: Path) -> Path:
    """The records of the run that a folder, or a file of them, means. Raises UsageError."""
    if path.is_file() and path.name.endswith("metrics.jsonl"):
        return path
    found = sorted(path.glob("*metrics.jsonl")) if path.is_dir() else []
    found = [file for file in found if file.name == "metrics.jsonl"] or found
    if not found:
        problem = "holds no run (no metrics.jsonl)" if path.is_dir() else "no such folder of a run"
        raise UsageError(f"{path}: {problem}")
    if len(found) > 1:
        raise UsageError(f"{path}: holds several runs; name one of {', '.join(map(str, found))}")
    return found[0]
