"""What a terminal shows while the program works: progress bars and status lines, at its width.

Where stderr is no terminal, bars are written rarely: the log of a long run stays short.
"""

from __future__ import annotations

import math
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

REFRESH_SECONDS, LOG_SECONDS = 0.2, 60  # between two pictures of a bar: on a terminal, in a log
NARROW = 48  # columns, in fewer of which a bar has no room for words
EVALUATED = ("val_loss", "val_perplexity", "bits_per_byte", "dev_accuracy", "dev_f1")


class LogLines:
    """A stream on which each picture of a bar is a line: a log cannot draw it anew in its place."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write what is left of a picture without the moves of the cursor."""
        picture = text.replace("\x1b[A", "").strip()
        return self.stream.write(f"{picture}\n") if picture else 0


def progress_bar(iterable: Iterable | None = None, **settings: Any) -> tqdm:
    """A tqdm bar of the terminal's width; where stderr is none, a line now and then."""
    seconds, file = REFRESH_SECONDS, sys.stderr
    if not sys.stderr.isatty():
        seconds, file = LOG_SECONDS, LogLines(sys.stderr)
    # By its maxinterval, 10 s, tqdm would draw oftener than by its mininterval.
    intervals = {"mininterval": seconds, "maxinterval": max(10, seconds)}
    return tqdm(iterable, dynamic_ncols=True, file=file, **intervals, **settings)


def training_bar(step: int, last_step: int) -> tqdm:
    """The bar of a run: what matters comes first, since a narrow terminal cuts off the end."""
    picture = "{remaining} left{desc} |{bar}| {n_fmt}/{total_fmt} steps"
    return progress_bar(initial=step, total=last_step, bar_format=picture)


def show_record(bar: tqdm, record: dict[str, Any]) -> None:
    """Put a step's figures on the training bar, and an evaluation on a line of its own."""
    loss, lr = record["loss"] or math.nan, f"{record['lr']:.1e}".replace("e-0", "e-")
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
    if record.get("sample"):
        bar.write("  " + " ".join(record["sample"].split()))


def say(*lines: str) -> None:
    """Print status lines, wrapped where stdout is a terminal; what follows a label hangs there."""
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for line in lines:
        if columns > 0:
            label = re.match(r"\w* {2,}", line) if columns >= NARROW else None
            hanging = " " * (label.end() if label else 2)
            line = textwrap.fill(
                line,
                columns,
                subsequent_indent=hanging,
                break_long_words=False,
                break_on_hyphens=False,
            )
        print(line)
