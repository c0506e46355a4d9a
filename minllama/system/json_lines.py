"""JSON in text files: an object per line, as in .jsonl, or one list of objects, as in .json."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minllama.system.errors import UsageError

Lines = Iterable[tuple[int, str]]  # number and text
BETWEEN = re.compile(r"[\s,]*")  # two items of a list
MOST_LINES = 1_000  # of one item, which is parsed again with every line that it gains


def read_objects(lines: Lines, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file, streamed, each with the number of its first line.

    A file that begins with `[` is one list of objects, else each line but blank ones is an object.
    Raises UsageError `file:line: ...` for anything else.
    """
    lines = iter(lines)
    first = next((pair for pair in lines if pair[1].strip()), None)
    if first is None:
        return
    read = _items if first[1].lstrip().startswith("[") else _values
    for number, value in read(itertools.chain([first], lines), path):
        if not isinstance(value, dict):
            raise UsageError(f"{path}:{number}: not a JSON object")
        yield number, value


def _values(lines: Lines, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in lines:
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{path}:{number}: not JSON ({error})") from None


def _items(lines: Lines, path: Path) -> Iterator[tuple[int, Any]]:
    """The items of a list that begins in the first line; an item may span several lines."""
    decode, text, number, ended = json.JSONDecoder().raw_decode, "", 0, False
    for last, line in lines:
        if number == 0:
            line = line.lstrip()[1:]
        number, text = (number, f"{text}\n{line}") if text else (last, line)
        if last - number > MOST_LINES:
            raise UsageError(f"{path}:{number}: an item of more than {MOST_LINES:,} lines")
        at = 0
        while (start := BETWEEN.match(text, at).end()) < len(text):
            number, at = number + text.count("\n", at, start), start
            if ended:
                raise UsageError(f"{path}:{number}: more after the end of the list")
            if text[at] == "]":
                ended, at = True, at + 1
                continue
            try:
                value, end = decode(text, at)
            except (ValueError, RecursionError) as error:
                if getattr(error, "pos", 0) < len(text.rstrip()):
                    what = getattr(error, "msg", error)
                    raise UsageError(f"{path}:{last}: not JSON ({what})") from None
                break  # it continues in the next line
            yield number, value
            number, at = number + text.count("\n", at, end), end
        else:
            at = len(text)
        text = text[at:]
    if not ended:
        raise UsageError(f"{path}:{number}: not JSON (its list has no end)")
