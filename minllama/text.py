"""Text files as documents: finding files, reading .txt, .jsonl and `label ||| sentence` lines.

Files are streamed, so a corpus may be far larger than memory. Knows nothing of vocabularies.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import importlib.util
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from config import DATA_DIR
from minllama.errors import UsageError
from minllama.files import check_regular

# ---------------------------------------------------------------------------- finding files

TEXT_SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")


def find_text_files(patterns: Sequence[str | Path], *, flag: str = "--pretrain_data") -> list[Path]:
    """The files that names, folders and globs in `patterns` match: in order, none twice.

    A folder means its .txt, .jsonl and .gz files at any depth, sorted. Raises UsageError, naming
    `flag`, for a pattern that matches nothing or something that is not a file.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        for path in _expand(str(pattern), flag):
            found.setdefault(path.resolve(), path)
    if not found:
        raise UsageError(f"{flag}: no file is named")
    return list(found.values())


def _expand(pattern: str, flag: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and _has_text_suffix(p))
        if not inside:
            raise UsageError(
                f"{flag} {pattern}: the folder holds no {', '.join(TEXT_SUFFIXES)} file"
            )
        return inside
    if path.is_file():
        return [path]
    if path.exists():
        raise UsageError(f"{flag} {pattern}: not a regular file (a pipe or a device)")
    matches = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    files = [p for p in matches if p.is_file()]
    if not files:
        hint = download_hint(path)
        what = "matches no file" if glob.has_magic(pattern) else "no such file or folder"
        raise UsageError(f"{flag} {pattern}: {what}" + (f"; {hint}" if hint else ""))
    return files


def _has_text_suffix(path: Path) -> bool:
    return path.name.lower().endswith(TEXT_SUFFIXES)


def download_hint(path: Path) -> str | None:
    """What `data/download.py` says of a missing file; None where that script is not there."""
    script = DATA_DIR / "download.py"
    if not script.is_file():
        return None
    spec = importlib.util.spec_from_file_location("minllama_download", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.download_hint(path)
    except Exception:  # a hint must never hide the message it adds to
        return None


# ---------------------------------------------------------------------------- reading text


@dataclass(frozen=True)
class Reading:
    """How a text file becomes documents; part of a token cache's key."""

    document_per_line: bool = False  # plain text: a document a line instead of a file
    text_field: str = "text"  # .jsonl: the field that holds the text; "a.b" is b inside a
    encoding_errors: str = "strict"  # bytes that are not UTF-8: "strict" refuses, "replace" U+FFFD
    sentences_only: bool = False  # `label ||| sentence` files: each sentence a document


READ_BYTES = 1 << 18  # one read; memory while reading a long document is a few of these
LABELLED_LINE = re.compile(r"\s*(?:-?\d+)?\s*\|\|\|\s")


class TextSource:
    """A file read as text, gzip or not.

    `on_bytes` is told of the bytes of the file itself (compressed ones of a .gz) as they are read.
    Raises UsageError naming the file, and the line where there is one.
    """

    def __init__(
        self,
        path: Path,
        *,
        encoding_errors: str = "strict",
        on_bytes: Callable[[int], object] | None = None,
    ) -> None:
        self.path, self.encoding_errors, self.on_bytes = path, encoding_errors, on_bytes

    def blocks(self) -> Iterator[str]:
        """The text in blocks of about READ_BYTES, without a BOM and with CRLF turned into LF."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")(self.encoding_errors)
        line, held = 1, ""  # held: a CR whose LF may open the next block
        for data in self._raw_blocks():
            try:
                text = held + decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                byte = error.object[error.start]
                raise UsageError(
                    f"{self.path}:{line}: byte 0x{byte:02x} is not UTF-8; convert the file, or "
                    "--encoding_errors replace"
                ) from None
            line += data.count(b"\n")
            held = "\r" if data and text.endswith("\r") else ""
            text = text[: len(text) - len(held)].replace("\r\n", "\n")
            if text:
                yield text

    def lines(self) -> Iterator[tuple[int, str]]:
        """(line number from 1, line without its newline); lines end at newlines only."""
        number, pending = 1, []
        for block in self.blocks():
            first, *rest = block.split("\n")
            pending.append(first)
            for line in rest:
                yield number, "".join(pending)
                number, pending = number + 1, [line]
        last = "".join(pending)
        if last:
            yield number, last

    def _raw_blocks(self) -> Iterator[bytes]:
        """Decompressed bytes, and b"" at the end."""
        check_regular(self.path)
        try:
            with open(self.path, "rb") as file:
                packed = file.read(2) == b"\x1f\x8b"
                if self.path.suffix.lower() == ".gz" and not packed:
                    raise UsageError(f"{self.path}: named .gz, but not a gzip file")
                file.seek(0)
                size, told = os.fstat(file.fileno()).st_size, 0
                stream: Any = gzip.GzipFile(fileobj=file) if packed else file
                while data := stream.read(READ_BYTES):
                    position = file.tell()
                    if position > size:  # a log that grows faster than it is read has no end
                        raise UsageError(f"{self.path}: grew while it was read; wait for its end")
                    if self.on_bytes is not None:
                        self.on_bytes(position - told)
                        told = position
                    yield data
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UsageError(f"{self.path}: damaged gzip file ({error}); fetch it again") from None
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"{self.path}: cannot be read ({reason})") from None
        yield b""


class Block(NamedTuple):
    """A stretch of a document's text; `ends` on the document's last one."""

    text: str
    ends: bool


def read_documents(
    path: Path, reading: Reading, *, on_bytes: Callable[[int], object] | None = None
) -> Iterator[Block]:
    """The documents of one file, streamed; blank ones are left out.

    Raises UsageError `file:line: ...` for what cannot be read as `reading` says.
    """
    source = TextSource(path, encoding_errors=reading.encoding_errors, on_bytes=on_bytes)
    if path.name.lower().endswith(JSON_SUFFIXES):
        texts = (_json_text(path, n, line, reading) for n, line in source.lines() if line.strip())
    elif reading.sentences_only and is_labelled(path):
        texts = (split_labelled(path, n, line)[1] for n, line in source.lines() if line.strip())
    elif reading.document_per_line:
        texts = (line for _, line in source.lines())
    else:
        return _whole_document(source.blocks())
    return (Block(text, True) for text in texts if text and not text.isspace())


def _whole_document(blocks: Iterable[str]) -> Iterator[Block]:
    blank: list[str] = []  # blank so far: a file of nothing else has no document
    started = False
    for text in blocks:
        if not started and text.isspace():
            blank.append(text)
            continue
        yield Block(text if started else "".join([*blank, text]), False)
        started = True
    if started:
        yield Block("", True)


def _json_text(path: Path, number: int, line: str, reading: Reading) -> str:
    where, name = f"{path}:{number}", reading.text_field
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON ({error})") from None
    value = _field(record, name)
    if not isinstance(value, str):
        fields = ", ".join(sorted(record)[:8]) if isinstance(record, dict) else "no fields"
        what = "no field" if value is None else f"{type(value).__name__}, not a string, in field"
        raise UsageError(f"{where}: {what} {name!r} (has: {fields}); name it with --text_field")
    text = value.replace("\r\n", "\n")
    try:  # JSON can spell half a surrogate pair, which no UTF-8 can hold
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        if reading.encoding_errors == "strict":
            raise UsageError(
                f"{where}: half a surrogate pair in field {name!r}; repair it, or "
                "--encoding_errors replace"
            ) from None
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _field(record: Any, name: str) -> Any:
    if isinstance(record, dict) and name in record:
        return record[name]
    for part in name.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def is_labelled(path: Path, *, lines: int = 20) -> bool:
    """Whether the first lines all read `label ||| sentence`, the format of labelled files."""
    if path.name.lower().endswith(JSON_SUFFIXES):
        return False
    source = TextSource(path, encoding_errors="replace")
    seen = 0
    for _, line in source.lines():
        if line.strip():
            if not LABELLED_LINE.match(line):
                return False
            seen += 1
        if seen == lines:
            break
    return seen > 0


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


# ---------------------------------------------------------------------------- the tokenizer
