"""The messages of an Arrow file or stream, checked before pyarrow reads them.

pyarrow allocates what a message claims, and unpacks what its buffers hold: 100 kB may be 4 GB. Here
only the claims are read, from the flatbuffers of the Arrow columnar format, version 1.5, "IPC".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from minllama.system.errors import UsageError

ARROW_MAGIC, FOOTER_MAGIC = b"ARROW1\0\0", b"ARROW1"
CONTINUATION = b"\xff" * 4
METADATA_BYTES = 1 << 26
MESSAGE_BYTES = 1 << 31  # unpacked; it is in memory as a whole
ROWS = 1 << 30  # of a batch: those of a column of nulls take no bytes
DICTIONARY_BATCH, RECORD_BATCH = 2, 3


def check_messages(path: Path) -> None:
    """Raise UsageError for an Arrow file that is cut off, or whose messages fill the memory."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - len(FOOTER_MAGIC)))
        ends = file.read() == FOOTER_MAGIC
        file.seek(0)
        if file.read(len(ARROW_MAGIC)) != ARROW_MAGIC:
            file.seek(0)
        elif not ends:
            raise UsageError(f"{path}: damaged table (it is cut off); fetch it again")
        try:
            for rows, unpacked in _messages(file, size):
                if unpacked > MESSAGE_BYTES or rows > ROWS:
                    raise UsageError(
                        f"{path}: a batch of {rows:,} rows unpacks to {unpacked:,} bytes: write it "
                        "with smaller ones, or as .parquet"
                    )
        except (struct.error, IndexError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{path}: damaged table ({error}); fetch it again") from None


def _messages(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """The rows of each message, and the bytes that it takes in memory; ValueError for lies."""
    while (sign := file.read(4)) == CONTINUATION:
        (length,) = struct.unpack("<i", file.read(4))
        if length == 0:
            return
        body = file.tell() + length
        if not 0 < length <= METADATA_BYTES or body > size:
            raise ValueError("it is cut off, or a message's length is wrong")
        data = file.read(length)
        message = struct.unpack_from("<I", data)[0]
        (body_length,) = _field(data, message, 3, "<q")
        if not 0 <= body_length <= size - body:
            raise ValueError("it is cut off, or a message's length is wrong")
        yield _claims(file, data, message, body, body_length)
        file.seek(body + body_length)
    if sign:
        raise ValueError("no message where one should begin")


def _claims(
    file: BinaryIO, data: bytes, message: int, body: int, body_length: int
) -> tuple[int, int]:
    kind, header = _field(data, message, 1, "<B")[0], _table(data, message, 2)
    if kind not in (DICTIONARY_BATCH, RECORD_BATCH) or header is None:
        return 0, body_length
    batch = header if kind == RECORD_BATCH else _table(data, header, 1)
    if batch is None:
        return 0, body_length
    (rows,) = _field(data, batch, 0, "<q")
    buffers = _table(data, batch, 2)
    if _table(data, batch, 3) is None or buffers is None:  # not compressed
        return rows, body_length
    (count,), unpacked = struct.unpack_from("<I", data, buffers), 0
    for number in range(count):
        start, length = struct.unpack_from("<qq", data, buffers + 4 + 16 * number)
        if length >= 8:  # begins with its length once unpacked; -1: as it is
            if not 0 <= start <= body_length - length:
                raise ValueError("a buffer is outside of its message")
            file.seek(body + start)
            (claimed,) = struct.unpack("<q", file.read(8))
            unpacked += claimed if claimed >= 0 else length
    return rows, unpacked


def _place(data: bytes, table: int, number: int) -> int | None:
    """Where a field of a flatbuffer's table is; None where it is left out."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0 or 4 + 2 * number + 2 > struct.unpack_from("<H", data, vtable)[0]:
        return None
    (offset,) = struct.unpack_from("<H", data, vtable + 4 + 2 * number)
    return table + offset if offset else None


def _field(data: bytes, table: int, number: int, layout: str) -> tuple[int]:
    """A number of a table, 0 where it is left out."""
    place = _place(data, table, number)
    return (0,) if place is None else struct.unpack_from(layout, data, place)


def _table(data: bytes, table: int, number: int) -> int | None:
    """Where the table or vector begins that a field points to."""
    place = _place(data, table, number)
    return None if place is None else place + struct.unpack_from("<I", data, place)[0]
