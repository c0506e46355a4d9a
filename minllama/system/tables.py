"""Tables in files: parquet and Arrow, by pyarrow, as rows of named values, streamed.

Recognised by their first bytes. Knows nothing of what the columns mean.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minllama.system.arrow_messages import ARROW_MAGIC, check_messages
from minllama.system.errors import UsageError
from minllama.system.files import open_regular
from minllama.system.kinds import count_controls
from minllama.system.packages import import_optional
from minllama.system.parquet_pages import check_row_groups

TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")
BATCH_BYTES, BATCH_ROWS = 1 << 24, 1024  # of rows in memory at once, by their mean size
BATCH_VALUES = 1 << 24  # in the lists of a batch
ROWS_PER_BYTE = 100  # of a file; billions of nulls take a few, and hours
TEXT_CHARS = 1 << 27  # of one text, as of a line of a text file
Format = Literal["parquet", "arrow file", "arrow stream"]


def table_format(path: Path) -> Format | None:
    """How a file holds a table; None for one that is none. Raises UsageError for a misnamed one."""
    with open_regular(path) as file:
        head = file.read(64)
    if head.startswith(b"PAR1") and count_controls(head):
        return "parquet"
    if head.startswith(ARROW_MAGIC):
        return "arrow file"
    if head.startswith(b"\xff" * 4) and len(head) > 8:
        return "arrow stream"
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES and not head.startswith((b"PARE", b"FEA1", b"version https")):
        raise UsageError(
            f"{path}: named {suffix}, but not such a file; fetch it again, or rename it"
        )
    return None


class Table(NamedTuple):
    """An opened table: its columns' names, those of its class labels, and its rows."""

    columns: list[str]
    class_names: dict[str, list[str]]  # of columns of numbers, as the Hugging Face hub has them
    rows: Callable[[Collection[str] | None], Iterator[tuple[float, dict[str, Any]]]]


def open_table(path: Path) -> Table:
    """A table whose `rows` of the columns asked for are a dict each, and the share of it read.

    Raises UsageError for a damaged one, and one that would fill the memory.
    """
    pyarrow = import_optional("pyarrow", f"{path}: reading it")
    import_optional("pyarrow.parquet", f"{path}: reading it")
    is_parquet = table_format(path) == "parquet"
    with _errors_of(path):
        if is_parquet:
            schema = pyarrow.parquet.read_schema(path)
        else:
            check_messages(path)
            with _arrow_stream(path) as file:
                schema = pyarrow.ipc.open_stream(file).schema

    def rows(columns: Collection[str] | None) -> Iterator[tuple[float, dict[str, Any]]]:
        batches = (_parquet_batches if is_parquet else _arrow_batches)(path, columns)
        number = 1
        with _errors_of(path):
            for done, batch in batches:
                batch.validate(full=True)  # else its offsets may point anywhere
                for array in batch.columns:
                    _check_values(array, path)
                if number + batch.num_rows > ROWS_PER_BYTE * path.stat().st_size:
                    raise UsageError(f"{path}: {number + batch.num_rows:,} rows in a few bytes")
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    part = batch.slice(start, BATCH_ROWS)
                    values = [_values(array, path, number) for array in part.columns]
                    for row in zip(*values, strict=True):
                        yield done, dict(zip(part.schema.names, row, strict=True))
                    number += part.num_rows

    return Table(schema.names, _class_names(schema), rows)


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """A block in which what pyarrow raises is a UsageError that names the file."""
    pyarrow = import_optional("pyarrow", f"{path}: reading it")
    try:
        yield
    except UsageError:
        raise
    except (pyarrow.ArrowException, OSError, MemoryError, ValueError, OverflowError) as error:
        words = " ".join(str(error).split())[:120]
        raise UsageError(f"{path}: damaged table ({words}); fetch it again") from None


def _check_values(array: Any, path: Path, *, inside: bool = False) -> None:
    """Raise UsageError for many million values in the lists of some rows: nulls take no bytes."""
    if inside and len(array) > BATCH_VALUES:
        raise UsageError(f"{path}: {len(array):,} values in the lists of a few rows, too many")
    if hasattr(array, "field") and array.type.num_fields:
        for index in range(array.type.num_fields):
            _check_values(array.field(index), path, inside=inside)
    elif hasattr(array, "values"):
        _check_values(array.values, path, inside=True)


def _values(array: Any, path: Path, first: int) -> Iterator[Any]:
    """A column's values of some rows, of which the first has this number."""
    if not hasattr(array, "indices"):
        for number, scalar in enumerate(array, start=first):
            yield _value(scalar, path, number)
        return
    texts: dict[int | None, Any] = {None: None}  # one for all rows that have the same
    for number, index in enumerate(array.indices.to_pylist(), start=first):
        if index not in texts:
            texts[index] = _value(array.dictionary[index], path, number)
        yield texts[index]


def _value(scalar: Any, path: Path, number: int) -> Any:
    try:
        value = scalar.as_py()
    except UnicodeDecodeError:
        raise UsageError(f"{path}, row {number}: not UTF-8") from None
    if isinstance(value, str) and len(value) > TEXT_CHARS:
        raise UsageError(f"{path}, row {number}: a text of more than {TEXT_CHARS:,} characters")
    return value


def _class_names(schema: Any) -> dict[str, list[str]]:
    """The names of the labels in the columns that are numbers of classes."""
    try:
        stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = stored["info"]["features"]
        named = {name: feature.get("names") for name, feature in features.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {
        name: names
        for name, names in named.items()
        if isinstance(names, list) and all(isinstance(each, str) for each in names)
    }


def _parquet_batches(path: Path, columns: Collection[str] | None) -> Iterator[tuple[float, Any]]:
    """Batches of rows of a parquet file, each with the share of the rows read by then.

    Texts stay in the dictionary that they are stored by: a million rows may be one text of 100 MB.
    """
    parquet = import_optional("pyarrow.parquet", f"{path}: reading it")
    with parquet.ParquetFile(path) as file:
        total, names = file.metadata.num_rows, file.schema_arrow.names
        leaves = [file.schema.column(index) for index in range(len(file.schema))]
    wanted = [name for name in names if columns is None or name in columns]
    texts = [leaf.path for leaf in leaves if leaf.logical_type.type == "STRING"]
    streamed = {"buffer_size": 1 << 20, "pre_buffer": False}
    with parquet.ParquetFile(path, read_dictionary=texts, **streamed) as file:
        done = 0
        for number, group in enumerate(check_row_groups(path, wanted)):
            rows = max(1, min(BATCH_ROWS, BATCH_BYTES * group.rows // max(1, group.unpacked)))
            for batch in file.iter_batches(
                rows, row_groups=[number], columns=wanted, use_threads=False
            ):
                done += batch.num_rows
                yield min(1.0, done / max(1, total)), batch


@contextlib.contextmanager
def _arrow_stream(path: Path) -> Iterator[Any]:
    """An Arrow file at the beginning of its stream, which also a file with a footer holds."""
    pyarrow = import_optional("pyarrow", f"{path}: reading it")
    with pyarrow.OSFile(str(path)) as file:
        if table_format(path) == "arrow file":
            file.seek(len(ARROW_MAGIC))
        yield file


def _arrow_batches(path: Path, columns: Collection[str] | None) -> Iterator[tuple[float, Any]]:
    """Record batches of an Arrow file, each with the share of the file read by then."""
    pyarrow = import_optional("pyarrow", f"{path}: reading it")
    size = max(1, os.path.getsize(path))
    with _arrow_stream(path) as file:
        names = pyarrow.ipc.open_stream(file).schema.names
    wanted = [i for i, name in enumerate(names) if columns is None or name in columns]
    options = pyarrow.ipc.IpcReadOptions(included_fields=wanted, use_threads=False)
    with _arrow_stream(path) as file:
        for batch in pyarrow.ipc.open_stream(file, options=options):
            yield min(1.0, file.tell() / size), batch
