"""A run as one HTML page: curves, samples, plan, choices and environment.

The page is self-contained: it needs no network. Knows a run by its records and run.json.
"""

from __future__ import annotations

import html
import itertools
import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from config import FLAGS
from minllama.cli.command_line import launch_command, printable
from minllama.cli.console import EVALUATED, by_source
from minllama.runs.run_folder import Findings, RunFolder, launch_of
from minllama.system.files import write_text
from minllama.text.copies import Copies

PAGE = Path(__file__).parent / "page"  # the template, and uPlot, which draws the curves
MOST_POINTS = 2000  # of a curve
MOST_SAMPLES, SAMPLE_LENGTH = 100, 4000  # texts, characters
MOST_SOURCES, NAME_LENGTH = 64, 200  # figures by source of a record, characters of a source's name
LARGEST = 1e300  # of a figure: damaged records may hold integers that no float can
PLACES = ("step", "tokens", "elapsed")  # x axes
MEASURED = (
    *("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory"),
    *("gpu_memory_used", "gpu_power_watts", "gpu_utilization"),
)
# Shown of a start in run.json, beside everything in its "environment".
ENVIRONMENT = ("device", "dtype", "processes", "resumed_at_step")

# ---------------------------------------------------------------------------- curves


def number(value: Any) -> int | float | None:
    """The value as a point of a curve; None for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not abs(value) < LARGEST:  # also NaN
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


class Curves:
    """A run's records as curves of at most MOST_POINTS points, thinned as they arrive.

    Each point is the mean of `stride` steps, a power of two, and stands at the last of them. Where
    evaluations or samples are too many, every second one is dropped.
    """

    def __init__(self, records: Iterable[dict[str, Any]] = ()) -> None:
        self.stride = 1
        # Of what is MEASURED: sum and count, so that in a mean every step counts alike.
        self.points: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.samples: list[tuple[int, str]] = []
        for record in records:
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        """Add a step's record; one that is not later than the last is left out."""
        place = {name: number(record.get(name)) for name in PLACES}
        step = place["step"]
        if not isinstance(step, int) or step <= (self.points[-1]["step"] if self.points else 0):
            return
        point: dict[str, Any] = dict(place)
        for name in MEASURED:
            value = number(record.get(name))
            point[name] = (value or 0, value is not None)
        self._append(point)
        if len(self.points) > MOST_POINTS:
            self.stride *= 2
            points, self.points = self.points, []
            for point in points:
                self._append(point)
        scores = {name: number(record.get(name)) for name in EVALUATED}
        for name, source, value in itertools.islice(by_source(record), MOST_SOURCES):
            scores[f"{name}, {source[:NAME_LENGTH]}"] = number(value)
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
        # A figure of each source has a name that no other has: "val_loss, wiki/".
        names = dict.fromkeys((*PLACES, *EVALUATED))
        names |= dict.fromkeys(name for point in self.evaluations for name in point)
        return {
            "stride": self.stride,
            "steps": steps,
            "evaluations": {n: [point.get(n) for point in self.evaluations] for n in names},
            "samples": self.samples,
        }


def thinned(items: list, most: int) -> list:
    """The items, or if they are more than `most`, every second one, with the last among them."""
    return items if len(items) <= most else items[::-2][::-1]


# ---------------------------------------------------------------------------- the page


def describe_run(
    name: str,
    curves: Curves,
    starts: Sequence[dict[str, Any]],
    copies: Copies | None = None,
    findings: Findings | None = None,
) -> dict[str, Any]:
    """A run as the page's script reads it. `starts` are run.json's, which may hold anything."""
    start = starts[-1] if starts else {}
    options, environment, plan = (
        start.get(key) if isinstance(start.get(key), kind) else kind()
        for key, kind in (("options", dict), ("environment", dict), ("plan", list))
    )
    choices = {
        f"--{flag}": (plain_text(options[flag]), plain_text(field.default))
        for flag, field in FLAGS.items()
        if flag in options and options.get("option") in field.metadata["read_by"]
    }
    typed = [names for start in starts if isinstance(names := start.get("typed"), list)]
    words = environment.get("command")
    return {
        "name": printable(name),
        **curves.to_plain(),
        "copies": [(name, printable(text)) for name, text in copies.rows()] if copies else [],
        "findings": {
            printable(title): [[printable(text[:SAMPLE_LENGTH]) for text in row] for row in rows]
            for title, rows in (findings or {}).items()
        },
        "plan": [printable(str(line)) for line in plan],
        "choices": [(flag, value) for flag, (value, _) in choices.items()],
        "typed": [flag for flag in choices if any(flag[2:] in names for names in typed)],
        "changed": [flag for flag, (value, default) in choices.items() if value != default],
        "command": (
            launch_command(*map(str, words), **launch_of(start))
            if isinstance(words, list) and words
            else ""
        ),
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
        return printable(" ".join(map(str, value)))
    return printable(value.as_posix() if isinstance(value, Path) else str(value))


def page(
    title: str,
    runs: Sequence[dict[str, Any]],
    *,
    reload: int | None = None,
    notes: Sequence[str] = (),
) -> str:
    """One self-contained HTML page of runs, which reloads itself every `reload` seconds.

    `notes` stand above all.
    """
    written = time.time()
    data = {"title": title, "written": written, "reload": reload, "notes": notes, "runs": runs}
    # The data is JSON in a script element, which a sample's own </script> must not end.
    encoded = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "TITLE": html.escape(title),
        "DATA": encoded,
        "UPLOT_CSS": read_part("uPlot.min.css"),
        "UPLOT_JS": read_part("uPlot.iife.min.js"),
    }
    # In one pass, so that an @@DATA@@ in a sample stays as it is.
    return re.sub("@@([A-Z_]+)@@", lambda name: parts[name[1]], read_part("report.html"))


def read_part(name: str) -> str:
    """A file of the page's folder."""
    return (PAGE / name).read_text(encoding="utf-8")


def write_report(
    folder: RunFolder, curves: Curves, *, state: str, last_step: int, reload: int | None
) -> None:
    """Write report.html of a run that is in this `state` ("running", "finished", ...)."""
    what = (folder.starts(), folder.copies(), folder.findings())
    run = describe_run(str(folder.path), curves, *what)
    run |= {"state": state, "last_step": last_step}
    write_text(folder.file("report.html"), page(run["name"], [run], reload=reload))
