"""Text files as documents: finding files, reading .txt, .jsonl and `label ||| sentence` lines.

Files are streamed, so a corpus may be far larger than memory. Knows nothing of vocabularies.
"""

from __future__ import annotations

import codecs
import functools
import glob
import gzip
import os
import re
import runpy
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from config import DATA_DIR
from minllama.cli.console import progress_bar, say
from minllama.system.encodings import is_utf8, likely_encoding
from minllama.system.errors import UsageError
from minllama.system.files import check_regular, real_path
from minllama.system.json_lines import read_objects

# ---------------------------------------------------------------------------- finding files

SHOWN_FILES = 10  # of many, named one by one
SHOWN_KINDS = 5  # of the files in a folder that are skipped
TEXT_SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")


def find_text_files(patterns: Sequence[str | Path], *, flag: str = "--pretrain_data") -> list[Path]:
    """The files that names, folders and globs in `patterns` match: in order, none twice.

    A folder means its .txt and .jsonl files, also .gz, at any depth, sorted. Raises UsageError,
    naming `flag`, for a pattern that matches nothing or something that is not a file.
    """
    files: dict[str, Path] = {}
    for pattern in patterns:
        for path in _expand(str(pattern), flag):
            files.setdefault(real_path(path), path)
    if not files:
        raise UsageError(f"{flag}: no file is named")
    return list(files.values())


def _expand(pattern: str, flag: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file())
        files = [p for p in inside if p.name.lower().endswith(TEXT_SUFFIXES)]
        if files:
            _print_skipped(path, [p for p in inside if not p.name.startswith(".")])
        problem = f"the folder holds no {', '.join(TEXT_SUFFIXES)} file"
        if inside:
            problem += f"; name what else to read, as in '{path / '*'}{inside[0].suffix}'"
    elif path.exists():
        check_regular(path)
        return [path]
    else:
        matches = sorted(map(Path, glob.glob(pattern, recursive=True)))
        files = [p for p in matches if p.is_file()]
        what = "matches no file" if glob.has_magic(pattern) else "no such file or folder"
        problem = what + download_hint(path)
    if not files:
        raise UsageError(f"{flag} {pattern}: {problem}")
    return files


def _print_skipped(folder: Path, inside: Sequence[Path]) -> None:
    skipped = [p for p in inside if not p.name.lower().endswith(TEXT_SUFFIXES)]
    kinds = Counter(p.suffix.lower() or "without an end" for p in skipped).most_common()
    if kinds:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds[:SHOWN_KINDS])
        more = ", ..." if len(kinds) > SHOWN_KINDS else ""
        say(f"{folder}: {counts}{more} skipped; a file is read, whatever its end, if it is named")


def download_hint(path: Path) -> str:
    """`; COMMAND` to add to the message of a missing file that data/download.py can fetch."""
    try:
        hint = runpy.run_path(str(DATA_DIR / "download.py"))["download_hint"](path)
    except Exception:  # a hint must never hide the message it adds to
        return ""
    return f"; {hint}" if hint else ""


# ---------------------------------------------------------------------------- reading text


@dataclass(frozen=True)
class Reading:
    """How a text file becomes documents; part of a token cache's key."""

    document_per_line: bool = False  # plain text: a document a line instead of a file
    text_field: str = "text"  # .jsonl: the field that holds the text; "a.b" is b inside a
    encoding: str = "utf-8"  # any text encoding of Python's
    encoding_errors: str = "strict"  # bytes that are not in it: "strict" refuses, "replace" U+FFFD
    sentences_only: bool = False  # `label ||| sentence` files: each sentence a document

    @classmethod
    def from_flags(cls, flags: Any) -> Reading:
        """From a command's parsed flags, those of them that have a field's name."""
        names = {each.name for each in fields(cls)} & vars(flags).keys()
        return cls(**{name: getattr(flags, name) for name in names})


UTF8 = Reading()
MOSTLY = 0.2  # of the characters beyond ASCII: if more are not UTF-8, it is another encoding
FEW = 10  # of them may be a damaged spot in any case
SAMPLED_CHARS = 1 << 18  # on which a vocabulary is tried
READ_BYTES = 1 << 18  # one read; memory while reading a long document is a few of these
LABELLED_LINE = re.compile(r"\s*(?:-?\d+)?\s*\|\|\|\s")


def read_blocks(
    path: Path,
    reading: Reading = UTF8,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> Iterator[str]:
    """A file's text, gzip or not, in blocks of about READ_BYTES; no BOM, and CRLF turned into LF.

    `on_bytes` gets the number of bytes of each read of the file itself, compressed ones of a .gz.
    What was replaced is counted and printed at the end. Raises UsageError naming the file, and the
    line where there is one.
    """
    utf8 = is_utf8(reading.encoding)
    decoder = codecs.getincrementaldecoder(reading.encoding)(reading.encoding_errors)
    line, first, replaced = 1, True, 0
    held = ""  # a CR whose LF may open the next block
    for data in _raw_blocks(path, on_bytes):
        if first and utf8:
            _check_utf8(path, data, reading)
        try:
            decoded = decoder.decode(data, final=not data)
        except UnicodeError as error:
            raise _decode_error(path, line, error, reading) from None
        line += decoded.count("\n")
        if reading.encoding_errors == "replace":  # not counting those that the file itself has
            replaced += decoded.count("\ufffd") - utf8 * data.count("\ufffd".encode())
        text = held + (decoded.removeprefix("\ufeff") if first else decoded)
        first = first and not decoded
        held = "\r" if data and text.endswith("\r") else ""
        text = text[: len(text) - len(held)].replace("\r\n", "\n")
        if text:
            yield text
    if replaced > 0:
        _note(f"{path}: U+FFFD stands for what is not {reading.encoding}, {replaced:,} times")


@functools.cache  # a file may be read for a vocabulary, for a sample and for its tokens
def _note(text: str) -> None:
    tqdm.write(f"note: {text}")


def _check_utf8(path: Path, data: bytes, reading: Reading) -> None:
    """Raise UsageError for a text that begins in another encoding, which no error would show.

    UTF-16 without a BOM is UTF-8 of every second byte zero; and "replace" would leave nothing of
    a text in GBK.
    """
    zeros = 4 * data.count(0) > len(data)
    if not zeros and reading.encoding_errors == "strict":
        return
    bad, beyond = _not_utf8(data)
    likely = likely_encoding(data) if zeros or bad > MOSTLY * beyond else None
    if likely is not None:
        raise UsageError(f"{path}: not UTF-8; {_reads_as(data, likely)}")
    if bad > max(FEW, MOSTLY * beyond):
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


def _decode_error(path: Path, line: int, error: UnicodeError, reading: Reading) -> UsageError:
    if not isinstance(error, UnicodeDecodeError):
        return UsageError(f"{path}: not {reading.encoding} ({error})")
    data, start = error.object, error.start
    line += data[:start].count(b"\n")
    where = f"{path}:{line}: byte 0x{data[start]:02x}"
    if not is_utf8(reading.encoding):
        return UsageError(f"{where} is not {reading.encoding}; is that the file's --encoding?")
    bad, beyond = _not_utf8(data)
    likely = likely_encoding(data) if bad > MOSTLY * beyond else None
    if likely is not None:
        from_here = data if likely.startswith("utf-") else data[start:]
        return UsageError(f"{where} is not UTF-8; {_reads_as(from_here, likely)}")
    remedy = "name the file's encoding with --encoding"
    if bad <= max(FEW, MOSTLY * beyond):
        remedy = f"repair the file, or --encoding_errors replace, or {remedy}"
    return UsageError(f"{where} is not UTF-8; {remedy}")


def read_lines(path: Path, *options: Any) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its newline); `options` are those of `read_blocks`."""
    number, pending = 1, []
    for block in read_blocks(path, *options):
        first, *rest = block.split("\n")
        pending.append(first)
        for line in rest:
            yield number, "".join(pending)
            number, pending = number + 1, [line]
    last = "".join(pending)
    if last:
        yield number, last


def byte_bar(what: str, total: int) -> tqdm:
    """A bar that counts bytes; what is done within a second shows none."""
    units = {"unit": "B", "unit_scale": True}
    return progress_bar(total=total, desc=what, leave=False, disable=None, delay=1, **units)


def _raw_blocks(path: Path, on_bytes: Callable[[int], object]) -> Iterator[bytes]:
    """Decompressed bytes, and b"" at the end."""
    check_regular(path)
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            if path.suffix.lower() == ".gz" and not packed:
                raise UsageError(f"{path}: named .gz, but not a gzip file")
            file.seek(0)
            size, before = os.fstat(file.fileno()).st_size, 0
            stream: Any = gzip.GzipFile(fileobj=file) if packed else file
            while data := stream.read(READ_BYTES):
                position = file.tell()
                if position > size:  # a log that grows faster than it is read has no end
                    raise UsageError(f"{path}: grew while it was read; wait for its end")
                on_bytes(position - before)
                before = position
                yield data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: damaged gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
    yield b""


class Block(NamedTuple):
    """A stretch of a document's text; `ends` on the document's last one."""

    text: str
    ends: bool


def read_documents(
    path: Path, reading: Reading, *, on_bytes: Callable[[int], object] = lambda count: None
) -> Iterator[Block]:
    """The documents of one file, streamed; blank ones are left out.

    Raises UsageError `file:line: ...` for what cannot be read as `reading` says.
    """
    lines = read_lines(path, reading, on_bytes)
    if path.name.lower().endswith(JSON_SUFFIXES):
        objects = read_objects(lines, path)
        texts = (_json_text(record, f"{path}:{n}", reading) for n, record in objects)
    elif reading.sentences_only and is_labelled(path, reading):
        texts = (split_labelled(path, n, line)[1] for n, line in lines if line.strip())
    elif reading.document_per_line:
        texts = (line for _, line in lines)
    else:
        return _whole_document(read_blocks(path, reading, on_bytes))
    return (Block(text, True) for text in texts if text and not text.isspace())


def _whole_document(blocks: Iterable[str]) -> Iterator[Block]:
    blank, started = "", False  # white space is held back: a file of nothing else has no document
    for text in blocks:
        if started or not text.isspace():
            yield Block(blank + text, False)
            blank, started = "", True
        else:
            blank += text
    if started:
        yield Block("", True)


def _json_text(record: dict[str, Any], where: str, reading: Reading) -> str:
    name, value = reading.text_field, record
    for part in [name] if name in record else name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, str):
        fields = ", ".join(sorted(record)[:8]) or "no fields"
        what = "no field" if value is None else f"{type(value).__name__}, not a string, in field"
        raise UsageError(f"{where}: {what} {name!r} (has: {fields}); name it with --text_field")
    text = value.replace("\r\n", "\n")
    try:  # JSON can escape half a surrogate pair, which UTF-8 cannot encode
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        if reading.encoding_errors == "strict":
            remedy = "repair it, or --encoding_errors replace"
            raise UsageError(f"{where}: half a surrogate pair in {name!r}; {remedy}") from None
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def sample_texts(files: Sequence[Path], reading: Reading) -> Iterator[str]:
    """Some of the text of the first files, from the beginning of each: SAMPLED_CHARS in all."""
    files = files[:SHOWN_FILES]
    for path in files:
        room = SAMPLED_CHARS // len(files)
        for block in read_documents(path, reading):
            yield block.text[:room]
            room -= len(block.text)
            if room <= 0:
                break


def first_words(text: str) -> str:
    """How a text begins: four words of it, or a few characters where words have no spaces."""
    words = text.split()
    if len(words) >= 8:
        return " ".join(words[:4])
    return text.strip()[: min(8, len(text) // 2)].strip()


def is_labelled(path: Path, reading: Reading = UTF8) -> bool:
    """Whether the first lines all read `label ||| sentence`, the format of labelled files."""
    start = next(iter(read_blocks(path, reading)), "")  # a line may be as long as the file
    lines = start.split("\n")
    lines = [line for line in lines[:-1] or lines if line.strip()][:20]  # the last may be cut
    return bool(lines) and all(map(LABELLED_LINE.match, lines))


def split_labelled(path: Path, number: int, line: str) -> tuple[str, str]:
    """(label, sentence) of a line `label ||| sentence`, both as written, stripped.

    Raises UsageError `file:line: ...` where there is no ` ||| ` or no sentence.
    """
    label, bar, sentence = f" {line}".partition(" ||| ")
    if not bar:
        raise UsageError(f"{path}:{number}: no ` ||| `; a line reads `label ||| sentence`")
    if not sentence.strip():
        raise UsageError(f"{path}:{number}: no sentence after ` ||| `")
    return label.strip(), sentence.strip()
