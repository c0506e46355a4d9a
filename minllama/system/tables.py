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

from minllama.system.errors import UsageError
from minllama.system.files import check_regular
from minllama.system.kinds import CONTROLS
from minllama.system.packages import import_optional

TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")
BATCH_BYTES, BATCH_ROWS = 1 << 24, 1024  # of rows in memory at once, by their mean size
GROUP_BYTES = 1 << 32  # of a row group's columns that are read; usual are 1 to 500 MB
GROUP_VALUES = 1 << 28  # in the lists of a row group: nulls take no bytes in a file
Format = Literal["parquet", "arrow file", "arrow stream"]


def table_format(path: Path) -> Format | None:
    """How a file holds a table; None for one that is none. Raises UsageError for a misnamed one."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
    if head.startswith(b"PAR1") and len(head.translate(None, CONTROLS)) < len(head):
        return "parquet"
    if head.startswith(b"ARROW1\0\0"):
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
    with _errors_of(path):
        kind = table_format(path)
        if kind == "parquet":
            schema = pyarrow.parquet.read_schema(path)
        elif kind == "arrow file":
            with pyarrow.OSFile(str(path)) as file:
                schema = pyarrow.ipc.open_file(file).schema
        else:
            with pyarrow.OSFile(str(path)) as file:
                schema = pyarrow.ipc.open_stream(file).schema
    read = _parquet_batches if kind == "parquet" else _arrow_batches

    def rows(columns: Collection[str] | None) -> Iterator[tuple[float, dict[str, Any]]]:
        with _errors_of(path):
            number = 0
            for done, batch in read(path, kind, columns):
                batch.validate(full=True)  # else its offsets may point anywhere
                names, arrays = batch.schema.names, batch.columns
                for array in arrays:
                    _check_length(array, path)
                for index in range(batch.num_rows):
                    number += 1
                    row = {}
                    for name, array in zip(names, arrays, strict=True):
                        row[name] = _value(array[index], path, number)
                    yield done, row

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


def _check_length(array: Any, path: Path) -> None:
    """Raise UsageError for billions of values, also in lists: nulls of them take no bytes."""
    if len(array) > GROUP_VALUES:
        raise UsageError(f"{path}: {len(array):,} values in one batch of rows, too many")
    if hasattr(array, "field") and array.type.num_fields:
        for index in range(array.type.num_fields):
            _check_length(array.field(index), path)
    elif hasattr(array, "values"):
        _check_length(array.values, path)


def _value(scalar: Any, path: Path, number: int) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        raise UsageError(f"{path}, row {number:,}: not UTF-8") from None


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


def _parquet_batches(
    path: Path, kind: Format, columns: Collection[str] | None
) -> Iterator[tuple[float, Any]]:
    """Batches of rows of a parquet file, each with the share of the rows read by then.

    Texts stay in the dictionary that they are stored by: a million rows may be one text of 100 MB.
    """
    parquet = import_optional("pyarrow.parquet", f"{path}: reading it")
    with parquet.ParquetFile(path) as file:
        wanted = [n for n in file.schema_arrow.names if columns is None or n in columns]
        leaves = [file.schema.column(index) for index in range(len(file.schema))]
        texts = [each.path for each in leaves if each.logical_type.type == "STRING"]
        metadata = file.metadata
    with parquet.ParquetFile(
        path, read_dictionary=texts, buffer_size=1 << 20, pre_buffer=False
    ) as file:
        done = 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            size = _check_group(path, group, metadata.row_group(group), wanted)
            batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(1, size)))
            for batch in file.iter_batches(
                batch_rows, row_groups=[group], columns=wanted, use_threads=False
            ):
                done += batch.num_rows
                yield done / max(1, metadata.num_rows), batch


def _check_group(path: Path, number: int, group: Any, wanted: Collection[str]) -> int:
    """The bytes that the wanted columns of a row group say they have; UsageError for too many."""
    read = [group.column(index) for index in range(group.num_columns)]
    read = [column for column in read if column.path_in_schema.split(".")[0] in wanted]
    size = sum(max(0, column.total_uncompressed_size) for column in read)
    values = max((column.num_values for column in read), default=0)
    if size > GROUP_BYTES or values > GROUP_VALUES:
        raise UsageError(
            f"{path}: row group {number} unpacks to {size:,} bytes, {values:,} values: write it "
            "with smaller ones (row_group_size)"
        )
    return size


def _arrow_batches(
    path: Path, kind: Format, columns: Collection[str] | None
) -> Iterator[tuple[float, Any]]:
    """Record batches of an Arrow file or stream, each with the share of the file read by then."""
    pyarrow = import_optional("pyarrow", f"{path}: reading it")
    size = max(1, os.path.getsize(path))
    opening = pyarrow.ipc.open_file if kind == "arrow file" else pyarrow.ipc.open_stream

    def opened(file: Any, wanted: list[int] | None) -> Any:
        options = pyarrow.ipc.IpcReadOptions(included_fields=wanted, use_threads=False)
        return opening(file, options=options)

    with pyarrow.OSFile(str(path)) as file:
        names = opening(file).schema.names
    wanted = None if columns is None else [i for i, name in enumerate(names) if name in columns]
    with pyarrow.OSFile(str(path)) as file:
        reader = opened(file, wanted)
        if kind == "arrow file":
            count = reader.num_record_batches
            for index in range(count):
                yield (index + 1) / count, reader.get_batch(index)
        else:
            for batch in reader:
                yield min(1.0, file.tell() / size), batch
