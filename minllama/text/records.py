"""Files of records, each a value for every name: JSON objects, rows of CSV, parquet and Arrow.

Read by one function, whatever is made of them: documents, labelled sentences or dialogues.
"""

from __future__ import annotations

import csv
import itertools
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minllama.system.errors import UsageError
from minllama.system.json_lines import read_values
from minllama.system.peek import csv_delimiter, is_csv_name, is_table
from minllama.system.tables import open_table
from minllama.text.reading import UTF8, Reading, read_lines

CELL_CHARS = 1 << 24  # of a cell of a CSV, which may span lines
TRIED_LINES = 100  # of a CSV, to see how its cells are quoted
EXCELS_FIRST = re.compile(r"sep=(.)")  # a line before that of the columns
TURN_FIELDS = ("content", "value", "text")  # of a dialogue's turn, its words
DIALOGUES = ("conversations", "messages", "prompt", "instruction", "question")
SHOWN_FIELDS = 8
# Records, each with its number: of its first line, or in a table of the row, from 1.
Numbered = Iterator[tuple[int, dict[str, Any]]]


def read_records(
    path: Path,
    reading: Reading = UTF8,
    on_bytes: Callable[[int], object] = lambda count: None,
    *,
    columns: Collection[str] | None = None,
) -> Numbered:
    """The records of a file, streamed; of a table only these columns, by default all.

    Raises UsageError with the place for what is none, and for a table without any of the columns.
    """
    if is_table(path):
        yield from _table_records(path, on_bytes, columns)
    elif is_csv_name(path):
        yield from _csv_records(read_lines(path, reading, on_bytes), path, columns)
    else:
        for number, value in read_values(read_lines(path, reading, on_bytes), path):
            if not isinstance(value, dict):
                raise UsageError(f"{path}:{number}: not a JSON object")
            yield number, value


def places(path: Path) -> Callable[[int], str]:
    """Of a record's number where it is, for messages: `a.jsonl:3`, or `a.parquet, row 3`."""
    separator = ", row " if is_table(path) else ":"
    return lambda number: f"{path}{separator}{number}"


# ---------------------------------------------------------------------------- tables


def _table_records(
    path: Path, on_bytes: Callable[[int], object], columns: Collection[str] | None
) -> Numbered:
    table = open_table(path)
    _check_columns(str(path), table.columns, columns)
    size, reported = path.stat().st_size, 0
    for number, (share, row) in enumerate(table.rows(columns), start=1):
        if (read := int(size * share)) > reported:
            on_bytes(read - reported)
            reported = read
        yield number, row
    on_bytes(size - reported)


def _csv_records(
    lines: Iterable[tuple[int, str]], path: Path, columns: Collection[str] | None
) -> Numbered:
    """The rows of a table of text, each with the number of the line in which it begins."""
    texts = (line + "\n" for _, line in lines)
    skipped = 0
    first = next(texts, "")
    if match := EXCELS_FIRST.fullmatch(first.strip()):
        first, skipped = next(texts, ""), 1
    delimiter = match[1] if match else csv_delimiter(first)
    head = [first, *itertools.islice(texts, TRIED_LINES)]
    quoting = _quoting(head, delimiter)
    csv.field_size_limit(CELL_CHARS)
    rows = csv.reader(
        itertools.chain(head, texts), delimiter=delimiter, quoting=quoting, strict=True
    )
    number = skipped + 1
    try:
        names = _renamed([name.strip() for name in next(rows, [])], columns)
        _check_columns(f"{path}:{number}", names, columns)
        number = skipped + rows.line_num + 1
        for cells in rows:
            if len(cells) > len(names) and any(cells[len(names) :]):
                raise UsageError(
                    f"{path}:{number}: {len(cells)} cells, and the first line names {len(names)}: "
                    f"a text with {delimiter!r} in it stands in double quotes"
                )
            if cells:
                yield number, dict(zip(names, cells, strict=False))
            number = skipped + rows.line_num + 1
    except csv.Error as error:
        raise UsageError(
            f"{path}:{number}: not CSV ({error}) in the row that begins here: is a double quote "
            "not closed, or not doubled inside a text?"
        ) from None


def _quoting(head: Sequence[str], delimiter: str) -> int:
    """Whether double quotes stand around cells: not in a TSV of one line a row, as GLUE's are."""
    counts = {line.count(delimiter) for line in head if line.strip()}
    return csv.QUOTE_NONE if delimiter == "\t" and len(counts) == 1 else csv.QUOTE_MINIMAL


def _renamed(names: Sequence[str], columns: Collection[str] | None) -> list[str]:
    """The names with `Text` as `text`, where that is asked for and not there."""
    wanted = {*(columns or ())} - {*names}
    return [name.lower() if name.lower() in wanted else name for name in names]


def _check_columns(where: str, names: Sequence[str], columns: Collection[str] | None) -> None:
    if columns is None:
        return
    twice = [name for name in columns if names.count(name) > 1]
    if twice:
        raise UsageError(f"{where}: has the column {shown(twice[0])!r} more than once")
    if not {*columns} & {*names}:
        wanted = " or ".join(map(repr, sorted(columns)))
        label = ", --label_field that of the label" if "label" in columns else ""
        raise UsageError(
            f"{where}: no column {wanted} (has: {_listed(names)}); --text_field names the column "
            f"of the text{label}"
        )


# ---------------------------------------------------------------------------- fields


def field_of(record: dict[str, Any], name: str) -> Any:
    """The value of a field, `a.b` of a record inside a record; None where it is not there."""
    if name in record or "." not in name:
        return record.get(name)
    for part in name.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def field_texts(record: dict[str, Any], name: str) -> list[str | None] | None:
    """The texts of a field, `a.b` going deeper: one, or of a list on the way one of each item.

    A list at the end of it is one text, of its strings or of a dialogue's turns, a line each. None
    where there is no text.
    """
    return _texts_at(record, [name] if name in record else name.split("."))


def _texts_at(value: Any, parts: Sequence[str]) -> list[str | None] | None:
    if parts and isinstance(value, list):
        lists = [_texts_at(item, parts) for item in value]
        return None if not lists or None in lists else [text for texts in lists for text in texts]
    if parts and value is None:
        return [None]
    if parts:
        has_field = isinstance(value, dict) and parts[0] in value
        return _texts_at(value[parts[0]], parts[1:]) if has_field else None
    if isinstance(value, list):
        turns = [_turn_text(turn) for turn in value]
        return None if None in turns else ["\n".join(turns)]
    return [value] if value is None or isinstance(value, str) else None


def _turn_text(turn: Any) -> str | None:
    if isinstance(turn, dict):
        turn = next((turn[name] for name in TURN_FIELDS if name in turn), None)
    return turn if isinstance(turn, str) else None


def field_problem(record: dict[str, Any], name: str, path: Path) -> str:
    """Why a record has no text in a field, and what to do about it."""
    problem = f"no field {name!r} (has: {_listed(sorted(record))})"
    if name in record:
        kind = type(record[name]).__name__
        problem = f"{kind}, not a string, in field {name!r} (has: {_listed(sorted(record))})"
    for field in DIALOGUES:
        if field in record:
            turns = isinstance(record[field], list)
            reads = f"; --text_field {field} reads its turns as text" if turns else ""
            return f"{problem}: a dialogue? --option finetune --train {path} trains on it{reads}"
    for field, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            inside = [key for key, text in value[0].items() if isinstance(text, str)]
            if inside:
                reads = f"--text_field {shown(field)}.{shown(inside[0])}"
                return f"{problem}: of its list {reads} reads a document each"
    others = [value for field, value in record.items() if field != name]
    if any(value is None or isinstance(value, str) for value in others):
        return f"{problem}; name it with --text_field"
    return f"{problem}, and no other has a text"


def _listed(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > SHOWN_FIELDS else ""
    return (", ".join(map(shown, names[:SHOWN_FIELDS])) or "no fields") + more


def shown(value: Any) -> str:
    """A value for a message: a stranger may have put anything there, of any size and depth."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    return text[:40] if text[:40].isprintable() else ascii(text[:40])[1:-1]
