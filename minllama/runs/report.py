"""A run as one page: its curves, samples, plan, choices and environment, for any browser.

The page holds everything it needs, asks no network for anything, and is rewritten while the run
lasts. Knows a run by its records and what run.json says of its starts.
"""

from __future__ import annotations

import html
import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from config import FLAGS
from minllama.cli.command_line import quoted
from minllama.cli.console import EVALUATED
from minllama.runs.run_folder import RunFolder
from minllama.system.files import write_text

PAGE = Path(__file__).parent / "page"  # the page's own text, and uPlot, which draws the curves
MOST_POINTS = 2000  # of a curve
MOST_SAMPLES, SAMPLE_LENGTH = 100, 4000  # texts, characters
LARGEST = 1e300  # of a figure: damaged records may hold integers that no float can
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
    if not abs(value) < LARGEST:  # NaN is not, either
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
        scores = {name: number(record.get(name)) for name in EVALUATED}
        if any(score is not None for score in scores.values()):
            self.evaluations = thinned([*self.evaluations, place | scores], MOST_POINTS)
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
            "evaluations": {name: [point[name] for point in self.evaluations] for name in names},
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


def write_report(
    folder: RunFolder, curves: Curves, *, state: str, last_step: int, reload: int | None
) -> None:
    """Write report.html of a run that is in this `state` ("running", "finished", ...)."""
    run = describe_run(str(folder.path), curves, folder.starts())
    run |= {"state": state, "last_step": last_step}
    write_text(folder.file("report.html"), page(run["name"], [run], reload=reload))
