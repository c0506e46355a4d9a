"""Files as documents: text, lines, what separators divide, and the texts of records.

Streamed; blank documents are left out. Knows nothing of vocabularies.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from minllama.system.errors import UsageError
from minllama.system.files import is_text
from minllama.system.json_lines import read_values
from minllama.system.peek import first_object, has_records, is_csv_name, is_json_name, is_table
from minllama.text.labelled import is_labelled, split_labelled
from minllama.text.reading import (
    BLANK_LINE,
    LINE_CHARS,
    Reading,
    note_once,
    read_blocks,
    read_lines,
    with_lf,
)
from minllama.text.records import field_problem, field_texts, places, read_records

SAMPLED_FILES, SAMPLED_CHARS = 10, 1 << 18  # on which a vocabulary is tried
# What other programs set between documents: <|endoftext|>, </s>; a line of signs alone; a gap.
SPECIAL = re.compile(r"<\|[\w-]{1,30}\|>|</s>|<eos>|<EOS>|<endoftext>|\[SEP\]")
RULE = re.compile(r"^(?:-{3,}|={3,}|\*{3,}|#{3,}|~{3,}|%)$", re.MULTILINE)
GAP = re.compile(r"\n(?:[^\S\n]*\n)+")
# Where the next sentence begins, behind closing quotes and brackets.
SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*\s+|[。！？…][”’」』）]*\s*|\n\s*\n\s*")
REST_OF_MARK = re.compile(r"\A[/|\w-]{0,32}>")  # of a text that was cut inside it
LEAST_MARKS, LEAST_GAPS = 3, 10  # fewer may be chance


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
    labelled = reading.sentences_only or is_csv_name(path)
    labelled = labelled and not is_json_name(path) and is_labelled(path, reading)
    if has_records(path) and not labelled:
        texts = _record_texts(path, reading, on_bytes)
    elif labelled and reading.sentences_only:
        lines = read_lines(path, reading, on_bytes)
        texts = (split_labelled(path, n, line)[1] for n, line in lines if line.strip())
    elif reading.document_per_line:
        texts = (line for _, line in read_lines(path, reading, on_bytes))
    elif reading.document_separator is not None:
        return _separated(read_lines(path, reading, on_bytes), reading.document_separator)
    else:
        return _whole_document(_with_spaces(path, read_blocks(path, reading, on_bytes)))
    return (Block(text, True) for text in texts if text and not text.isspace())


def _with_spaces(path: Path, blocks: Iterable[str]) -> Iterator[str]:
    """The blocks of a text; UsageError for a word that fills the memory, as it is encoded whole."""
    size = 0
    for text in blocks:
        rest = len(text) - 1 - max(text.rfind(" "), text.rfind("\n"))
        size = rest + size * (rest == len(text))
        if size > LINE_CHARS:
            raise UsageError(
                f"{path}: more than {LINE_CHARS:,} characters without a space or a line end: is it "
                f"the file that was meant? Else fold -w 1000 {path.name} makes lines"
            )
        yield text


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


# ---------------------------------------------------------------------------- texts of records


def _record_texts(path: Path, reading: Reading, on_bytes: Callable[[int], object]) -> Iterator[str]:
    """The texts of a file of records: of each its field's, of a JSON list of strings these."""
    name, place, empty = reading.text_field, places(path), 0
    if is_json_name(path) and not is_table(path):
        values = read_values(read_lines(path, reading, on_bytes), path)
    else:
        values = read_records(path, reading, on_bytes, columns={name, name.split(".")[0]})
    for number, value in values:
        if isinstance(value, str):
            texts = [value]
        elif not isinstance(value, dict):
            raise UsageError(f"{place(number)}: not a JSON object")
        else:
            texts = field_texts(value, name)
            if texts is None:
                has = first_object(path) if is_table(path) else {}  # of which a few were read
                problem = field_problem(has | value, name, path)
                raise UsageError(f"{place(number)}: {problem}")
        empty += texts.count(None)
        for text in texts:
            if text:
                yield _clean(text, place, number, reading)
    if empty:
        note_once(f"{path}: {empty:,} of its documents empty: null in {name!r}")


def _clean(value: str, place: Callable[[int], str], number: int, reading: Reading) -> str:
    text = with_lf(value)
    if is_text(text):  # JSON can escape half a surrogate pair, which UTF-8 cannot encode
        return text
    if reading.encoding_errors == "strict":
        remedy = "repair it, or --encoding_errors replace"
        raise UsageError(f"{place(number)}: half a surrogate pair in its text; {remedy}")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ---------------------------------------------------------------------------- samples


def sample_texts(files: Sequence[Path], reading: Reading) -> Iterator[str]:
    """Some of the text of the first files, from the beginning of each: SAMPLED_CHARS in all."""
    files = files[:SAMPLED_FILES]
    for path in files:
        room = SAMPLED_CHARS // len(files)
        for block in read_documents(path, reading):
            yield block.text[:room]
            room -= len(block.text)
            if room <= 0:
                break


def from_a_beginning(text: str) -> str:
    """A text that was cut out of a longer one, from where a sentence of it begins, or else a line.

    The whole where none begins, or too little of it is left to begin with.
    """
    enough = 8 if len(text.split()) >= 8 else 0
    for beginning in (SENTENCE_END, re.compile(r"\n\s*")):
        for end in beginning.finditer(text):
            rest = text[end.end() :]
            if len(rest.split()) >= enough and len(rest.strip()) >= 16:
                return rest
    return text


def first_words(text: str, markers: Sequence[str] = ()) -> str:
    """How a text begins: four words of it, or a few characters where words have no spaces.

    It ends in none of the `markers`, nor in what looks like one.
    """
    words = text.split()
    if len(words) >= 8:
        return " ".join(words[:4])
    text, end = text.strip(), min(8, len(text) // 2)
    for mark in re.finditer("|".join([*map(re.escape, markers), SPECIAL.pattern]), text):
        if mark.start() < end < mark.end():
            end = mark.start() or mark.end()
    return text[:end].strip()
