"""What a file of JSON objects is about, by the first of them."""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from pathlib import Path
from typing import Any

PEEK_BYTES = 1 << 20  # of the file; a first object that is longer is not looked at
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")


def is_json_name(path: Path) -> bool:
    """Whether a file is JSON by its name."""
    return path.name.lower().endswith(JSON_SUFFIXES)


def first_object(path: Path) -> dict[str, Any]:
    """The first object of a file, also of a list; empty where there is none to be read."""
    with contextlib.suppress(OSError, EOFError, zlib.error, ValueError, RecursionError):
        if path.is_file():
            with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
                text = file.read(PEEK_BYTES).decode("utf-8", "replace")
            return json.JSONDecoder().raw_decode(text, text.index("{"))[0]
    return {}
