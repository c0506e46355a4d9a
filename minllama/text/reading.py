"""A file's bytes as text: unpacked, decoded, in blocks or in lines.

Files are streamed, so a corpus may be far larger than memory. Knows nothing of documents.
"""

from __future__ import annotations

import codecs
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minllama.cli.console import progress_bar
from minllama.system.encodings import BOMS, is_utf8, likely_encoding
from minllama.system.errors import UsageError
from minllama.system.files import open_regular
from minllama.system.kinds import UNKNOWN, binary_kind, looks_binary
from minllama.system.peek import is_json_name, is_table
from minllama.system.unpacking import compression_of, read_unpacked

BLANK_LINE = "blank line"  # as a document separator: lines of nothing but white space
MOSTLY = 0.2  # of the characters beyond ASCII: if more are not UTF-8, it is another encoding
FEW = 10  # of them may be a damaged spot in any case
LINE_CHARS = 1 << 27  # of a line that is read as one
READ_BYTES = 1 << 18  # one read; memory while reading a long document is a few of these
SHOWN_FILES = 3  # of each encoding


@dataclass(frozen=True)
class Reading:
    """How a file becomes documents or labelled sentences; part of a token cache's key."""

    document_per_line: bool = False  # plain text: a document a line instead of a file
    text_field: str = "text"  # of records: the one that is the text; "a.b" is b inside a
    label_field: str = "label"  # of labelled records: the one that is the label
    encoding: str = "utf-8"  # any of Python's, of a file that has no BOM and is not UTF-8
    encoding_errors: str = "strict"  # bytes that are not in it: "strict" refuses, "replace" U+FFFD
    sentences_only: bool = False  # `label ||| sentence` files: each sentence a document
    document_separator: str | None = None  # plain text: stands between documents; or BLANK_LINE

    def __post_init__(self) -> None:
        if self.document_separator is not None and not self.document_separator.strip():
            raise UsageError(f"--document_separator '': name a text, or '{BLANK_LINE}'")
        if self.document_separator is not None and self.document_per_line:
            raise UsageError(
                f"--document_separator {self.document_separator} and --document_per_line both say "
                "where documents end: give one"
            )

    @classmethod
    def from_flags(cls, flags: Any) -> Reading:
        """How documents are read, from a command's flags that have a field's name."""
        names = {each.name for each in fields(cls)} & vars(flags).keys() - {"label_field"}
        return cls(**{name: getattr(flags, name) for name in names})

    @classmethod
    def of_records(cls, flags: Any) -> Reading:
        """How labelled sentences are read, from the flags of a command that takes them."""
        names = ("encoding", "text_field", "label_field")
        return cls(**{name: getattr(flags, name) for name in names})


UTF8 = Reading()


# ---------------------------------------------------------------------------- bytes


def _raw_blocks(path: Path, on_bytes: Callable[[int], object]) -> Iterator[bytes]:
    """Unpacked bytes of what may be text, and b"" at the end."""
    with open_regular(path) as file:
        packed = compression_of(file.read(16)) is not None
        file.seek(0)
        size, before, first = os.fstat(file.fileno()).st_size, 0, True
        for data in read_unpacked(file, path, READ_BYTES):
            kind = binary_kind(data, None if packed else path) if first else None
            if kind is not None:
                inside = "unpacked, is" if packed else "is"
                raise UsageError(f"{path}: {inside} {kind}")
            position, first = file.tell(), False
            if position > size:  # a log that grows faster than it is read has no end
                raise UsageError(f"{path}: grew while it was read; wait for its end")
            on_bytes(position - before)
            before = position
            yield data
    yield b""


def byte_bar(what: str, total: int) -> tqdm:
    """A bar that counts bytes; what is done within a second shows none."""
    units = {"unit": "B", "unit_scale": True}
    return progress_bar(total=total, desc=what, leave=False, disable=None, delay=1, **units)


# ---------------------------------------------------------------------------- encodings


def encoding_of(path: Path, reading: Reading = UTF8) -> str:
    """The encoding in which a file is read: its BOM's, else UTF-8 if it is that, else as given.

    So a folder may hold files of two encodings. Raises UsageError for a file that is no text.
    """
    if is_utf8(reading.encoding):
        return _bom_of(next(_raw_blocks(path, lambda count: None))) or "utf-8"
    stat = path.stat()
    return _tried_encoding(path, reading.encoding, stat.st_size, stat.st_mtime_ns)


def _bom_of(data: bytes) -> str | None:
    if data.startswith(codecs.BOM_UTF8):
        return "utf-8"
    return next((name for bom, name in BOMS.items() if data.startswith(bom)), None)


@functools.lru_cache(maxsize=1 << 16)  # a file is read several times in a run
def _tried_encoding(path: Path, given: str, size: int, modified: int) -> str:
    """The encoding of a file that may be in the given one: the whole of it is tried as UTF-8."""
    decoder, beyond_ascii = codecs.getincrementaldecoder("utf-8")(), False
    for number, data in enumerate(_raw_blocks(path, lambda count: None)):
        if number == 0 and (bom := _bom_of(data)):
            return bom
        try:
            beyond_ascii = not decoder.decode(data, final=not data).isascii() or beyond_ascii
        except UnicodeDecodeError:
            return given
    return "utf-8" if beyond_ascii else given


def encoding_line(files: Sequence[Path], reading: Reading) -> str | None:
    """Which files are read in which encoding, where not all are in the one that was given."""
    by_encoding: dict[str, list[Path]] = {}
    for path in itertools.filterfalse(is_table, files):
        by_encoding.setdefault(encoding_of(path, reading), []).append(path)
    given = "utf-8" if is_utf8(reading.encoding) else reading.encoding
    if by_encoding.keys() <= {given}:
        return None
    parts = []
    for name, paths in by_encoding.items():
        more = ", ..." if len(paths) > SHOWN_FILES else ""
        parts.append(f"{len(paths):,} as {name} ({', '.join(map(str, paths[:SHOWN_FILES]))}{more})")
    return f"encodings    {', '.join(parts)}: by BOM, else UTF-8, else --encoding"


def read_blocks(
    path: Path, reading: Reading = UTF8, on_bytes: Callable[[int], object] = lambda count: None
) -> Iterator[str]:
    """A file's text, unpacked, in blocks of about READ_BYTES, every line end turned into LF.

    Without a BOM, also at the beginning of later lines, where files were joined.
    `on_bytes` gets the number of bytes of each read of the file itself, compressed ones of a .gz.
    What was replaced is counted and printed at the end. Raises UsageError naming the file, and the
    line where there is one.
    """
    encoding = None
    line, replaced = 1, 0  # the number of the line in which the next block begins
    held = ""  # a CR whose LF may open the next block
    opens_line = True
    for data in _raw_blocks(path, on_bytes):
        if encoding is None:
            is_usual = is_utf8(reading.encoding)
            encoding = (_bom_of(data) or "utf-8") if is_usual else encoding_of(path, reading)
            utf8 = is_utf8(encoding)
            decoder = codecs.getincrementaldecoder(encoding)(reading.encoding_errors)
            _check_start(path, data, encoding, reading)
        try:
            decoded = decoder.decode(data, final=not data)
        except UnicodeError as error:
            raise _decode_error(path, line, held, error, encoding) from None
        if reading.encoding_errors == "replace":  # not counting those that the file itself has
            replaced += decoded.count("\ufffd") - utf8 * data.count("\ufffd".encode())
        text = held + decoded
        held = "\r" if data and text.endswith("\r") else ""
        text = with_lf(text[: len(text) - len(held)])
        line += text.count("\n")
        if "\ufeff" in text:
            text = re.sub("\n\ufeff+", "\n", text.lstrip("\ufeff") if opens_line else text)
        if text:
            opens_line = text.endswith("\n")
            yield text
    if replaced > 0:
        note_once(f"{path}: U+FFFD stands for what is not {encoding}, {replaced:,} times")


def with_lf(text: str) -> str:
    """The text with LF for every line end: CRLF, and CR alone, which old Macs had."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


@functools.cache  # a file may be read for a vocabulary, for a sample and for its tokens
def note_once(text: str) -> None:
    tqdm.write(f"note: {text}")


def _check_start(path: Path, data: bytes, encoding: str, reading: Reading) -> None:
    """Raise UsageError for what begins as another encoding or no text, and no error would show it.

    Latin-1 is any bytes; UTF-16 without a BOM is often UTF-8, with zeros and other control
    characters in it; and "replace" would leave nothing of a text in GBK.
    """
    if not is_utf8(encoding):
        one_byte = not codecs.lookup(encoding).name.startswith(
            ("utf-16", "utf-32", "cp037", "cp500")
        )
        if one_byte and looks_binary(data):
            raise UsageError(f"{path}: is {UNKNOWN}")
        return
    zeros = data.count(0) > min(len(data) / 4, max(FEW, len(data) / 100))
    if not zeros and reading.encoding_errors == "strict":
        return
    bad, beyond = _not_utf8(data)
    likely = likely_encoding(data) if zeros or bad > MOSTLY * beyond else None
    if likely is not None:
        raise UsageError(f"{path}: not UTF-8; {_reads_as(data, likely)}")
    is_other = bad > max(FEW, MOSTLY * beyond)
    if (zeros or is_other) and looks_binary(data):
        raise UsageError(f"{path}: is {UNKNOWN}")
    if is_other:
        raise UsageError(
            f"{path}: {bad:,} of {beyond:,} characters beyond ASCII are not UTF-8: name its "
            "encoding with --encoding, if it is text"
        )


def _not_utf8(data: bytes) -> tuple[int, int]:
    """How many characters beyond ASCII are not UTF-8, and how many there are in all."""
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(data)
    return text.count("\ufffd"), sum(character > "\x7f" for character in text)


def _reads_as(data: bytes, encoding: str) -> str:
    sample = data[:64].decode(encoding, "ignore").removeprefix("\ufeff").strip()[:12]
    return f"it is likely {encoding} ({sample!r}): --encoding {encoding} reads it"


def _decode_error(
    path: Path, line: int, held: str, error: UnicodeError, encoding: str
) -> UsageError:
    if not isinstance(error, UnicodeDecodeError):
        return UsageError(f"{path}: not {encoding} ({error})")
    data, start = error.object, error.start
    line += with_lf(held + data[:start].decode(encoding, "replace")).count("\n")
    where = f"{path}:{line}: byte 0x{data[start]:02x}"
    if not is_utf8(encoding):
        likely = likely_encoding(data)
        is_other = likely is not None and codecs.lookup(likely) != codecs.lookup(encoding)
        remedy = _reads_as(data[start:], likely) if is_other else "is that the file's --encoding?"
        return UsageError(f"{where} is not {encoding}; {remedy}")
    bad, beyond = _not_utf8(data)
    likely = likely_encoding(data) if bad > MOSTLY * beyond else None
    if likely is not None:
        from_here = data if likely.startswith("utf-") else data[start:]
        return UsageError(f"{where} is not UTF-8; {_reads_as(from_here, likely)}")
    if looks_binary(data):
        return UsageError(f"{where} is not UTF-8: the file is {UNKNOWN}")
    remedy = "name the file's encoding with --encoding"
    if bad <= max(FEW, MOSTLY * beyond):
        remedy = f"repair the file, or --encoding_errors replace, or {remedy}"
    return UsageError(f"{where} is not UTF-8; {remedy}")


# ---------------------------------------------------------------------------- lines


def read_lines(path: Path, *options: Any) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its newline); `options` are those of `read_blocks`.

    Raises UsageError for a line that is no line of text: a few MB of .gz may hold one of GBs.
    """
    number, pending, size = 1, [], 0
    for block in read_blocks(path, *options):
        first, *rest = block.split("\n")
        pending.append(first)
        size = len(rest[-1]) if rest else size + len(first)
        if size > LINE_CHARS:
            remedy = "text without lines is read as a .txt"
            if is_json_name(path):
                remedy = f"jq -c '.[]' {path.name} makes lines of a list"
            raise UsageError(
                f"{path}:{number + len(rest)}: a line of more than {LINE_CHARS:,} characters: is "
                f"it the file that was meant? Else {remedy}"
            )
        for line in rest:
            yield number, "".join(pending)
            number, pending = number + 1, [line]
    last = "".join(pending)
    if last:
        yield number, last
