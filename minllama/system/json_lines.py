"""JSON in text files: objects one after the other, as in .jsonl, or a list of them, as in .json."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minllama.system.errors import UsageError

Lines = Iterable[tuple[int, str]]  # number and text
END: tuple[int, None] = (0, None)  # after the last line
IN_LIST, IN_LINES = re.compile(r"\s*(,?)\s*"), re.compile(r"\s*()")  # between two items
LINE_END = re.compile(r"[^\S\n]*(?:\n|\Z)")
MOST_CHARS = 1 << 27  # of one item, which is in memory as a whole
SHORT = 1000  # characters; a longer item is parsed again when it has doubled, not at every line


def read_values(lines: Lines, path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a file, streamed, each with the number of its first line.

    A file that begins with `[` is one list of them, else each begins on a line of its own. Either
    may span lines. Raises UsageError `file:line: ...` for what is no JSON.
    """
    lines = iter(lines)
    first = next((pair for pair in lines if pair[1].strip()), None)
    if first is not None:
        is_list = first[1].lstrip().startswith("[")
        yield from _values(itertools.chain([first], lines), path, is_list=is_list)


def _values(lines: Lines, path: Path, *, is_list: bool) -> Iterator[tuple[int, Any]]:
    decode, between = json.JSONDecoder().raw_decode, IN_LIST if is_list else IN_LINES
    text, number, ended, comma = "", 0, False, True  # `text` begins in line `number`
    more: list[str] = []  # lines after it
    size, enough = 0, 0  # of all in characters; less is not worth a try
    for last, line in itertools.chain(lines, [END]):
        if line is not None:
            if number == 0 and is_list:
                line = line.lstrip()[1:]
            number = number if text or more else last
            more.append(line)
            size += len(line) + 1
            if size > MOST_CHARS:
                raise UsageError(f"{path}:{number}: an item of more than {MOST_CHARS:,} characters")
            if size < enough:
                continue
        text, more, at = "\n".join([text, *more] if text else more), [], 0
        while (start := (gap := between.match(text, at)).end()) < len(text):
            number, at, comma = number + text.count("\n", at, start), start, comma or bool(gap[1])
            if ended:
                raise UsageError(f"{path}:{number}: more after the end of the list")
            if is_list and text[at] == "]":
                ended, at = True, at + 1
                continue
            if is_list and not comma:
                raise UsageError(f"{path}:{number}: not JSON (no comma before this item)")
            try:
                value, end = decode(text, at)
            except (ValueError, RecursionError) as error:
                position = getattr(error, "pos", at)
                if position < len(text.rstrip()):
                    where = number + text.count("\n", at, position)
                    begun = f"; the item begins in line {number}" if where > number else ""
                    what = getattr(error, "msg", error)
                    raise UsageError(f"{path}:{where}: not JSON ({what}{begun})") from None
                break  # it continues in the next line
            if not is_list and not LINE_END.match(text, end):
                where = number + text.count("\n", at, end)
                raise UsageError(f"{path}:{where}: not JSON (more than one value in a line)")
            yield number, value
            number, at, comma = number + text.count("\n", at, end), end, False
        else:
            comma, at = comma or bool(gap[1]), len(text)
        text = text[at:]
        size = len(text)
        enough = 2 * size if size > SHORT else 0
    if text or (is_list and not ended):
        what = "its list" if is_list else "the object"
        raise UsageError(f"{path}:{number}: not JSON ({what} has no end)")
