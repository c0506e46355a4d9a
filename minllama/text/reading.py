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
from minllama.cli.command_line import has_line_break
from minllama.cli.console import progress_bar, say
from minllama.system.encodings import is_utf8, likely_encoding
from minllama.system.errors import UsageError
from minllama.system.files import check_regular, real_path
from minllama.system.json_lines import read_values
from minllama.system.peek import is_json_name

# ---------------------------------------------------------------------------- finding files

SHOWN_FILES = 10  # of many, named one by one
SHOWN_KINDS = 5  # of the files in a folder that are skipped
TEXT_SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


def find_text_files(patterns: Sequence[str | Path], *, flag: str = "--pretrain_data") -> list[Path]:
    """The files that names, folders and globs in `patterns` match: in order, none twice.

    A folder means its .txt and .jsonl files, also .gz, at any depth, sorted; hidden ones, and those
    of hidden folders in it, are left out, and counted. Raises UsageError, naming `flag`, for a
    pattern that matches nothing or something that is not a file.
    """
    files: dict[str, Path] = {}
    for pattern in patterns:
        for path in _expand(str(pattern), flag):
            if has_line_break(path):
                raise UsageError(f"{flag} {str(path)!r} has a line break in its name: rename it")
            files.setdefault(real_path(path), path)
    if not files:
        raise UsageError(f"{flag}: no file is named")
    return list(files.values())


def _expand(pattern: str, flag: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        there = sorted(p for p in path.rglob("*") if p.is_file())
        inside = [p for p in there if not _hidden_part(p, path)]
        files = [p for p in inside if _is_text(p)]
        _print_hidden(path, [p for p in there if _is_text(p) and _hidden_part(p, path)])
        if files:
            _print_skipped(path, inside)
        problem = f"the folder holds no {', '.join(TEXT_SUFFIXES)} file"
        if inside:
            problem += f"; name what else to read, as in '{path / '*'}{inside[0].suffix}'"
    elif path.exists():
        check_regular(path)
        return [path]
    else:
        matches = sorted(map(Path, glob.glob(pattern, recursive=True)))
        files = [p for p in matches if p.is_file()]
        folders = [p for p in matches if p.is_dir()]
        if files and folders and "**" not in pattern:
            count = f"{len(folders):,} folder{'s' * (len(folders) > 1)}"
            say(f"{pattern}: {count} left out ({folders[0]}); a folder that is named is read")
        what = "matches no file" if glob.has_magic(pattern) else "no such file or folder"
        problem = what + download_hint(path)
    if not files:
        raise UsageError(f"{flag} {pattern}: {problem}")
    return files


def _is_text(path: Path) -> bool:
    return path.name.lower().endswith(TEXT_SUFFIXES)


def _hidden_part(path: Path, folder: Path) -> str | None:
    """The part of a path in a folder that hides it: .git, .ipynb_checkpoints, a Mac's ._a.txt."""
    return next((part for part in path.relative_to(folder).parts if part.startswith(".")), None)


def _print_hidden(folder: Path, hidden: Sequence[Path]) -> None:
    names = sorted({_hidden_part(path, folder) for path in hidden})
    if names:
        shown = ", ".join(names[:SHOWN_KINDS]) + (", ..." if len(names) > SHOWN_KINDS else "")
        files = "1 hidden text file" if len(hidden) == 1 else f"{len(hidden):,} hidden text files"
        say(f"{folder}: {files} left out ({shown}); what is named is read, hidden or not")


def _print_skipped(folder: Path, inside: Sequence[Path]) -> None:
    skipped = [p for p in inside if not _is_text(p)]
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
        """From a command's parsed flags, those of them that have a field's name."""
        names = {each.name for each in fields(cls)} & vars(flags).keys()
        return cls(**{name: getattr(flags, name) for name in names})


UTF8 = Reading()
BLANK_LINE = "blank line"  # as a document separator: lines of nothing but white space
MOSTLY = 0.2  # of the characters beyond ASCII: if more are not UTF-8, it is another encoding
FEW = 10  # of them may be a damaged spot in any case
SAMPLED_CHARS = 1 << 18  # on which a vocabulary is tried
NO_TEXT = {  # how files begin that nobody means to train on the bytes of
    b"PK\x03\x04": "a zip archive, as .docx, .odt and .epub are",
    b"%PDF-": "a PDF",
    b"PAR1": "a parquet file",
    b"(\xb5/\xfd": "a zstandard archive",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GGUF": "a model",
    b"SQLite f": "a database",
}
LINE_CHARS = 1 << 27  # of a line that is read as one
READ_BYTES = 1 << 18  # one read; memory while reading a long document is a few of these
# What other programs set between documents: <|endoftext|>, </s>; a line of signs alone; a gap.
SPECIAL = re.compile(r"<\|[\w-]{1,30}\|>|</s>|<eos>|<EOS>|<endoftext>|\[SEP\]")
RULE = re.compile(r"^(?:-{3,}|={3,}|\*{3,}|#{3,}|~{3,}|%)$", re.MULTILINE)
GAP = re.compile(r"\n(?:[^\S\n]*\n)+")
LEAST_MARKS, LEAST_GAPS = 3, 10  # fewer may be chance
LABELLED_LINE = re.compile(r"[^|\n]{0,100}\|\|\|\s")  # a number, a word or nothing first


def read_blocks(
    path: Path,
    reading: Reading = UTF8,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> Iterator[str]:
    """A file's text, gzip or not, in blocks of about READ_BYTES, every line end turned into LF.

    Without a BOM, also at the beginning of later lines, where files were joined.
    `on_bytes` gets the number of bytes of each read of the file itself, compressed ones of a .gz.
    What was replaced is counted and printed at the end. Raises UsageError naming the file, and the
    line where there is one.
    """
    utf8 = is_utf8(reading.encoding)
    decoder = codecs.getincrementaldecoder(reading.encoding)(reading.encoding_errors)
    line, first, replaced = 1, True, 0  # the number of the line in which the next block begins
    held = ""  # a CR whose LF may open the next block
    opens_line = True
    for data in _raw_blocks(path, on_bytes):
        if first and utf8:
            _check_utf8(path, data, reading)
        first = False
        try:
            decoded = decoder.decode(data, final=not data)
        except UnicodeError as error:
            raise _decode_error(path, line, held, error, reading) from None
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
        _note(f"{path}: U+FFFD stands for what is not {reading.encoding}, {replaced:,} times")


def with_lf(text: str) -> str:
    """The text with LF for every line end: CRLF, and CR alone, which old Macs had."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


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


def _decode_error(
    path: Path, line: int, held: str, error: UnicodeError, reading: Reading
) -> UsageError:
    if not isinstance(error, UnicodeDecodeError):
        return UsageError(f"{path}: not {reading.encoding} ({error})")
    data, start = error.object, error.start
    line += with_lf(held + data[:start].decode(reading.encoding, "replace")).count("\n")
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


def byte_bar(what: str, total: int) -> tqdm:
    """A bar that counts bytes; what is done within a second shows none."""
    units = {"unit": "B", "unit_scale": True}
    return progress_bar(total=total, desc=what, leave=False, disable=None, delay=1, **units)


def _raw_blocks(path: Path, on_bytes: Callable[[int], object]) -> Iterator[bytes]:
    """Decompressed bytes, and b"" at the end."""
    check_regular(path)
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            packed = head.startswith(b"\x1f\x8b")
            for magic, kind in NO_TEXT.items():
                if head.startswith(magic):
                    raise UsageError(f"{path}: is {kind}, no text: save what it holds as .txt")
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
    if is_json_name(path):
        texts = _json_texts(lines, path, reading)
    elif reading.sentences_only and is_labelled(path, reading):
        texts = (split_labelled(path, n, line)[1] for n, line in lines if line.strip())
    elif reading.document_per_line:
        texts = (line for _, line in lines)
    elif reading.document_separator is not None:
        return _separated(lines, reading.document_separator)
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


def _separated(lines: Iterable[tuple[int, str]], separator: str) -> Iterator[Block]:
    """The documents between separators, without the line ends around these; blank ones left out."""
    held, started = "", False  # line ends are held back: those before a separator are dropped
    stands_alone = separator == BLANK_LINE or RULE.fullmatch(separator)  # on a line of its own
    mark = "" if separator == BLANK_LINE else separator
    for _, line in lines:
        if stands_alone:
            *ended, last = ("", "") if line.strip() == mark else (line,)
        else:
            *ended, last = line.split(separator)
        for text in ended:
            if started or text.strip():
                yield Block(held + text if text.strip() else "", True)
            held, started = "", False
        if started or last.strip():
            if last.strip():
                yield Block(held + last, False)
                held, started = "", True
            else:
                held += last
            held += "\n"
    if started:
        yield Block("", True)


def seen_separator(text: str) -> str | None:
    """What may stand between documents in a text, as it is there often; None where nothing does."""
    marks = Counter(SPECIAL.findall(text)) or Counter(RULE.findall(text))
    mark, count = marks.most_common(1)[0] if marks else ("", 0)
    if count >= LEAST_MARKS:
        return mark
    return BLANK_LINE if len(GAP.findall(text)) >= LEAST_GAPS else None


def _json_texts(lines: Iterable[tuple[int, str]], path: Path, reading: Reading) -> Iterator[str]:
    """The texts of a file of JSON: of each object its field's, of a list of strings these."""
    empty = 0
    for number, record in read_values(lines, path):
        where = f"{path}:{number}"
        if isinstance(record, str):
            texts = [record]
        elif not isinstance(record, dict):
            raise UsageError(f"{where}: not a JSON object")
        else:
            name = reading.text_field
            parts = [name] if name in record else name.split(".")
            texts = _field_texts(record, parts)
            if texts is None:
                raise UsageError(f"{where}: {_field_problem(record, name, path)}")
        empty += texts.count(None)
        for text in texts:
            if text:
                yield _json_string(text, where, reading)
    if empty:
        _note(f"{path}: {empty:,} of its documents empty: null in {reading.text_field!r}")


TURN_FIELDS = ("content", "value", "text")  # of a dialogue's turn, its words


def _field_texts(value: Any, parts: Sequence[str]) -> list[str | None] | None:
    """The texts at the end of a path of fields: one, or of a list on the way one of each item.

    A list at the end of it is one text, of its strings or of a dialogue's turns, a line each. None
    where there is no text.
    """
    if parts and isinstance(value, list):
        found = [_field_texts(item, parts) for item in value]
        return None if not found or None in found else [text for texts in found for text in texts]
    if parts:
        has_field = isinstance(value, dict) and parts[0] in value
        return _field_texts(value[parts[0]], parts[1:]) if has_field else None
    if isinstance(value, list):
        turns = [_turn_text(turn) for turn in value]
        return None if None in turns else ["\n".join(turns)]
    return [value] if value is None or isinstance(value, str) else None


def _turn_text(turn: Any) -> str | None:
    if isinstance(turn, dict):
        turn = next((turn[name] for name in TURN_FIELDS if name in turn), None)
    return turn if isinstance(turn, str) else None


DIALOGUES = ("conversations", "messages", "prompt", "instruction", "question")


def _field_problem(record: dict[str, Any], name: str, path: Path) -> str:
    """Why a record has no text in a field, and what to do about it."""
    names = sorted(record)
    shown = ", ".join(map(_shown, names[:8])) or "no fields"
    problem = f"no field {name!r} (has: {shown})"
    if name in record:
        problem = f"{type(record[name]).__name__}, not a string, in field {name!r} (has: {shown})"
    for field in DIALOGUES:
        if field in record:
            turns = isinstance(record[field], list)
            reads = f"; --text_field {field} reads its turns as text" if turns else ""
            return f"{problem}: a dialogue? --option finetune --train {path} trains on it{reads}"
    for field, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            inside = [key for key, text in value[0].items() if isinstance(text, str)]
            if inside:
                reads = f"--text_field {_shown(field)}.{_shown(inside[0])}"
                return f"{problem}: of its list {reads} reads a document each"
    if any(isinstance(value, str) for value in record.values()):
        return f"{problem}; name it with --text_field"
    return f"{problem}, and no other has a text"


def _shown(field: str) -> str:
    """A field's name for a message: a stranger may have put anything there, of any length."""
    return field[:40] if field[:40].isprintable() else ascii(field[:40])


def _json_string(value: str, where: str, reading: Reading) -> str:
    text = with_lf(value)
    try:  # JSON can escape half a surrogate pair, which UTF-8 cannot encode
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        if reading.encoding_errors == "strict":
            remedy = "repair it, or --encoding_errors replace"
            raise UsageError(f"{where}: half a surrogate pair in its text; {remedy}") from None
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
