"""What a file of records is about, by its name and the first of them."""

from __future__ import annotations

import contextlib
import csv
import json
from pathlib import Path
from typing import Any

from minllama.system.errors import UsageError
from minllama.system.tables import open_table, table_format
from minllama.system.unpacking import read_unpacked, uncompressed_name

PEEK_BYTES = 1 << 20  # of the file; a first object that is longer is not looked at
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
CSV_SUFFIXES = (".csv", ".tsv")


def is_json_name(path: Path) -> bool:
    """Whether a file is JSON by its name."""
    return uncompressed_name(path).lower().endswith(JSON_SUFFIXES)


def is_csv_name(path: Path) -> bool:
    """Whether a file is a table of text by its name, whose first line names the columns."""
    return uncompressed_name(path).lower().endswith(CSV_SUFFIXES)


def is_table(path: Path) -> bool:
    """Whether a file is a parquet or Arrow table, by its first bytes."""
    return path.is_file() and table_format(path) is not None


def has_records(path: Path) -> bool:
    """Whether a file is of records with names for their values, and not of text."""
    return is_json_name(path) or is_csv_name(path) or is_table(path)


def first_object(path: Path) -> dict[str, Any]:
    """The first object of a file, also of a list; empty where there is none to be read.

    Of a table or a .csv its columns, without values. Raises UsageError for a table that cannot be
    read: what it is about would be a guess, and another error than that it is damaged.
    """
    if is_table(path):
        return dict.fromkeys(open_table(path).columns)
    with contextlib.suppress(OSError, UsageError, ValueError, RecursionError, csv.Error):
        if path.is_file():
            with path.open("rb") as file:
                data = next(read_unpacked(file, path, PEEK_BYTES), b"")
            text = data.decode("utf-8-sig", "replace")
            if is_csv_name(path):
                line = text.partition("\n")[0].rstrip("\r")
                return dict.fromkeys(csv_columns(line))
            return json.JSONDecoder().raw_decode(text, text.index("{"))[0]
    return {}


def csv_columns(line: str) -> list[str]:
    """The names in the first line of a table of text."""
    cells = next(csv.reader([line], delimiter=csv_delimiter(line)), [])
    return [name.strip() for name in cells]


def csv_delimiter(line: str) -> str:
    """What stands between the cells of a table of text, by its first line."""
    return max(",;\t", key=line.count)
