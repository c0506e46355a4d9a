"""The pages of a parquet file, checked before pyarrow reads them.

pyarrow unpacks a page as a whole, whatever it claims: 100 kB may be 2 GB; and its view of damaged
metadata may end the process. Here the headers alone are read, which are Thrift's compact protocol:
numbered fields, as in `parquet.thrift` of the Parquet format.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from minllama.system.errors import UsageError

FOOTER_BYTES = 1 << 26
PAGE_BYTES = 1 << 29  # unpacked; usual is 1 MB, and of long texts a thousand in a page
LIST_VALUES = 1 << 26  # of a row group's lists: nulls take no bytes in a file
HEADER_BYTES = (1 << 12, 1 << 20)  # of a page: the second where it holds long statistics
MOST_NESTED = 20


class RowGroup(NamedTuple):
    """What pages of the wanted columns there are in a row group."""

    rows: int
    unpacked: int  # bytes


def check_row_groups(path: Path, columns: Collection[str]) -> Iterator[RowGroup]:
    """The row groups of a file, each when its pages of these columns have been checked.

    Raises UsageError for a damaged one, and one whose pages fill the memory.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 8))
            length, magic = struct.unpack("<I4s", file.read(8))
            if magic != b"PAR1" or not 0 < length <= min(FOOTER_BYTES, size - 12):
                raise ValueError("it is cut off, or its end is wrong")
            file.seek(size - 8 - length)
            footer, _ = _read_struct(file.read(length), 0)
            for group in footer.get(4, []):
                unpacked = 0
                for column in group[1]:
                    names = column[3][3]
                    if names[0].decode() in columns:
                        unpacked += _check_column(file, path, column, nested=len(names) > 1)
                yield RowGroup(group[3], unpacked)
    except UsageError:
        raise
    except (struct.error, LookupError, ValueError, TypeError, AttributeError) as error:
        words = error if isinstance(error, ValueError) else "its headers are wrong"
        raise UsageError(f"{path}: damaged table ({words}); fetch it again") from None


def _check_column(file: BinaryIO, path: Path, column: dict[int, Any], *, nested: bool) -> int:
    """The bytes of a column of a row group once unpacked; UsageError for a page of too many."""
    if 1 in column:
        raise ValueError("a column is in another file")
    chunk = column[3]
    place = min(chunk[9], chunk.get(11) or chunk[9])
    end, unpacked, values = place + chunk[7], 0, 0
    name = b".".join(chunk[3]).decode()[:80]
    while place < end:
        page, place = _page_header(file, place)
        claimed, packed = page[2], page[3]
        if claimed < 0 or packed < 0:
            raise ValueError("a page of fewer bytes than none")
        values += max(page.get(number, {}).get(1, 0) for number in (5, 7, 8))
        if claimed > PAGE_BYTES or (nested and values > LIST_VALUES):
            raise UsageError(
                f"{path}: a page of the column {name!r} unpacks to {claimed:,} bytes, "
                f"{values:,} values in its row group: write it with smaller row groups"
            )
        place, unpacked = place + packed, unpacked + claimed
    return unpacked


def _page_header(file: BinaryIO, place: int) -> tuple[dict[int, Any], int]:
    """The fields of the header of a page, and where the page begins behind it."""
    for size in HEADER_BYTES:
        file.seek(place)
        data = file.read(size)
        try:
            page, length = _read_struct(data, 0)
            return page, place + length
        except IndexError:
            if len(data) < size:
                break
    raise ValueError("it is cut off, or a page's header is wrong")


# ---------------------------------------------------------------------------- Thrift

TRUE, FALSE, BYTE, INT16, INT32, INT64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)


def _read_struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """A struct's fields by number, and where it ends. IndexError where the data ends before."""
    if depth > MOST_NESTED:
        raise ValueError("its headers are nested too deep")
    fields, number = {}, 0
    while (head := data[at]) != 0:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _read_number(data, at)
        fields[number], at = _read_value(data, at, head & 15, depth)
    return fields, at + 1


def _read_value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (TRUE, FALSE):
        return kind == TRUE, at
    if kind == BYTE:
        return data[at], at + 1
    if kind in (INT16, INT32, INT64):
        return _read_number(data, at)
    if kind == DOUBLE:
        return None, at + 8
    if kind == BINARY:
        length, at = _read_varint(data, at)
        if at + length > len(data):
            raise IndexError
        return data[at : at + length], at + length
    if kind in (LIST, SET):
        return _read_list(data, at, depth)
    if kind == STRUCT:
        return _read_struct(data, at, depth + 1)
    raise ValueError("its headers are wrong")


def _read_list(data: bytes, at: int, depth: int) -> tuple[list[Any], int]:
    head, at = data[at], at + 1
    size, kind = head >> 4, head & 15
    if size == 15:
        size, at = _read_varint(data, at)
    if size > len(data):  # every item takes a byte at least
        raise IndexError
    items = []
    for _ in range(size):
        item, at = _read_value(data, at, BYTE if kind in (TRUE, FALSE) else kind, depth)
        items.append(item)
    return items, at


def _read_number(data: bytes, at: int) -> tuple[int, int]:
    """A signed number: 0, -1, 1, -2, ... are 0, 1, 2, 3, ..."""
    value, at = _read_varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("its headers are wrong")
