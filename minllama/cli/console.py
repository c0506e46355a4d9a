"""What a terminal shows: progress bars and status lines at its width, sizes and durations.

Where stderr is no terminal, a bar is a line now and then: the log of a long run stays short.
"""

from __future__ import annotations

import math
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from tqdm import tqdm

from minllama.cli.chinese import columns_of, translate
from minllama.cli.command_line import for_drawing, printable

REFRESH_SECONDS, LOG_SECONDS = 0.2, 60  # between updates of a bar: on a terminal, in a log
NARROW = 48  # columns: a narrower bar has no room for words
EVALUATED = (
    *("val_loss", "val_perplexity", "bits_per_byte", "old_val_loss", "old_val_perplexity"),
    *("dev_accuracy", "dev_f1"),
)


class LogLines:
    """A stream on which each update of a bar is a line: in a log it cannot be redrawn in place."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write the bar without its cursor movements, if anything is left."""
        line = text.replace("\x1b[A", "").strip()
        return self.stream.write(f"{line}\n") if line else 0


def progress_bar(iterable: Iterable | None = None, *, kind: type = tqdm, **settings: Any) -> tqdm:
    """A tqdm bar of the terminal's width; where stderr is no terminal, a line now and then."""
    seconds, file = REFRESH_SECONDS, for_drawing(sys.stderr)
    if not sys.stderr.isatty():
        seconds, file = LOG_SECONDS, LogLines(sys.stderr)
    # Its default maxinterval of 10 s would make tqdm update more often than mininterval says.
    intervals = {"mininterval": seconds, "maxinterval": max(10, seconds)}
    return kind(iterable, dynamic_ncols=True, file=file, **intervals, **settings)


class TimedBar(tqdm):
    """A bar of work that ends at a time, however its speed changes."""

    seconds_left: Callable[[], float] | None = None

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the bar shows, `remaining` no longer than the time that is left."""
        shown = super().format_dict
        if self.seconds_left is not None and (rate := shown["rate"]):
            left = min((self.total - self.n) / rate, max(0.0, self.seconds_left()))
            shown["remaining"] = self.format_interval(left)
        return shown


def training_bar(
    step: int, last_step: int, seconds_left: Callable[[], float] | None = None
) -> TimedBar:
    """The bar of a run: what matters comes first, since a narrow terminal cuts off the end."""
    bar_format = "{remaining} left{desc} |{bar}| {n_fmt}/{total_fmt} steps"
    idle = {"disable": True} if step >= last_step else {}  # of a resumed run that had ended
    bar = progress_bar(kind=TimedBar, initial=step, total=last_step, bar_format=bar_format, **idle)
    bar.seconds_left = seconds_left
    return bar


def by_source(record: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(name, source, value) of the figures that a record has for each source of held-out text."""
    for name in ("val_loss", "bits_per_byte"):
        figures = record.get(f"{name}_by_source")
        for source, value in figures.items() if isinstance(figures, dict) else ():
            yield name, source, value


def show_record(bar: tqdm, record: dict[str, Any]) -> None:
    """Show a step's figures on the training bar, and an evaluation's on a line of its own."""
    loss = math.nan if record["loss"] is None else record["loss"]
    lr = f"{record['lr']:.1e}".replace("e-0", "e-")
    rate = tqdm.format_sizeof(record["tokens_per_second"])
    text = f", loss {loss:.3f}, lr {lr}, {rate} tok/s"
    if not bar.disable and bar.ncols is not None and bar.ncols < NARROW:
        text = text.replace(",", "").replace(" tok", "")
    bar.set_description_str(text, refresh=False)
    bar.update()
    figures = [
        f"{key.replace('_', ' ')} {record[key]:,.{0 if record[key] >= 1000 else 4}f}"
        for key in EVALUATED
        if record.get(key) is not None
    ]
    if figures:
        bar.write(f"epoch {record['epoch']}, step {record['step']:,}: {', '.join(figures)}")
    sources: dict[str, list[str]] = {}
    for key, source, value in by_source(record):
        shown = "not finite" if value is None else f"{value:,.4f}"
        sources.setdefault(source, []).append(f"{key.replace('_', ' ')} {shown}")
    for source, shown in sources.items():
        bar.write(f"  {source}: {', '.join(shown)}")
    if record.get("sample"):
        bar.write("  " + " ".join(record["sample"].split()))


def say(*lines: str) -> None:
    """Print status lines; on a terminal wrapped, and indented by the label that they begin with.

    In the user's language, where there is a translation.
    """
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for line in lines:
        line = printable(line).replace("\n", "\\n")  # in a file's name, or a label
        line = translate(line, sys.stdout)
        print(wrapped(line, columns) if columns > 0 else line)


def say_command(line: str, command: str | None) -> None:
    """Print a status line and below it, whole, the command that it is about, if there is one."""
    say(line)
    if command is not None:
        print(" ", command)


def wrapped(line: str, columns: int) -> str:
    """A status line in lines of so many columns, broken at spaces and after Chinese punctuation."""
    # For textwrap, which counts characters: \0 is a wide one's second column, "\1 " no real space.
    line = "".join(char + "\0" * (columns_of(char) - 1) for char in line)
    line = re.sub("(?<=[，。；：、）]\0)(?! )", "\1 ", line)
    label = re.match(r"[\w\0]* {2,}", line) if columns >= NARROW else None
    indent = " " * (label.end() if label else 2)
    unbroken = {"break_long_words": False, "break_on_hyphens": False}  # flags, paths
    line = textwrap.fill(line, columns, subsequent_indent=indent, **unbroken)
    return re.sub("\1 ?|\0", "", line)


def human_size(size: float) -> str:
    """Bytes in powers of 1,000: 226 MB, 1.17 GB."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"


def human_time(seconds: float) -> str:
    """A duration: 45 s, 3 min 20 s, 2 h 5 min, 98 days 21 h."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
