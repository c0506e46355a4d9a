"""Text to token ids and back: reading corpora, the SentencePiece wrapper, training a vocabulary.

Text files are streamed, so a corpus may be far larger than memory, and a document may be cut into
pieces wherever that provably leaves its ids what encoding it whole gives. Of the modules that write
files it is the lowest, so how one is written whole stands here. Knows nothing of tensors, models,
chunks or caches.

    python tokenizer.py train --input story.txt more/ --vocab_size 4096 --output my.model
    python tokenizer.py export --tokenizer_model my.model --output tokenizer.bin
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import glob
import gzip
import importlib.util
import io
import json
import os
import random
import re
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
import sentencepiece

from config import (
    OneLineParser,
    UsageError,
    fingerprint,
    report_usage_error,
    with_underscores,
)

EMBEDDED_VOCABULARY = Path(__file__).resolve().parent / "data" / "stories-vocabulary.model"
LLAMA2_PIECES = 32000
SPACE = "\u2581"  # SentencePiece's visible stand-in for a space

# ------------------------------------------------------------------------------- whole files


def atomic_write(
    path: Path,
    write: Callable[[BinaryIO], None],
    *,
    verify: Callable[[Path], object] | None = None,
) -> None:
    """Write a file so that its name only ever holds a whole one.

    `write` fills a temporary file in the same folder, which is flushed to the disk, read back by
    `verify`, and renamed over `path`. On any failure the temporary file is removed and `path` is as
    it was. Raises OSError, and what `verify` raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            if verify is not None:
                forget_cached(file)
        if verify is not None:
            verify(temporary)
        replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # a failing disk must not hide what failed first
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def forget_cached(file: BinaryIO) -> None:
    """Drop a flushed file from the memory of the system, so that the disk itself is read next."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def replace(source: Path, target: Path) -> None:
    """os.replace, tried again where Windows reports that a scanner or indexer holds the target."""
    for pause in (0.05, 0.2, 0.5, 1.0):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if os.name != "nt":
                raise
            time.sleep(pause)
    os.replace(source, target)


def sync_folder(folder: Path) -> None:
    """Flush a rename to the disk, where the system can open folders (Windows cannot)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all; raises UsageError where it cannot."""
    try:
        atomic_write(path, lambda file: file.write(data))
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from None


# ------------------------------------------------------------------------------- finding files

TEXT_SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")


def find_text_files(patterns: Sequence[str | Path], *, flag: str = "--pretrain_data") -> list[Path]:
    """Files that the names, folders and globs in `patterns` stand for: in order, none twice.

    A folder stands for its .txt, .jsonl and .gz files at any depth, sorted. Raises UsageError,
    naming `flag`, for a pattern that stands for nothing or for something that is not a file.
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
        hint = _download_hint(path)
        what = "matches no file" if glob.has_magic(pattern) else "no such file or folder"
        raise UsageError(f"{flag} {pattern}: {what}" + (f"; {hint}" if hint else ""))
    return files


def _has_text_suffix(path: Path) -> bool:
    return path.name.lower().endswith(TEXT_SUFFIXES)


def _download_hint(path: Path) -> str | None:
    """What `data/download.py` says of a missing file; None where that script is not there."""
    script = EMBEDDED_VOCABULARY.parent / "download.py"
    if not script.is_file():
        return None
    spec = importlib.util.spec_from_file_location("minllama_download", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.download_hint(path)
    except Exception:  # a hint must never stand in front of the message it adds to
        return None


# ------------------------------------------------------------------------------- reading text


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
    """A file opened for reading as text, gzip or not, that notices when the file changes meanwhile.

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
        """(line number from 1, line without its newline); only newlines part lines."""
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
        try:
            if not self.path.is_file():
                what = "a folder, not a file" if self.path.is_dir() else "not a regular file"
                raise UsageError(f"{self.path}: {what if self.path.exists() else 'no such file'}")
            with open(self.path, "rb") as file:
                before = os.fstat(file.fileno())
                yield from self._watched_blocks(file, before.st_size)
                after = os.fstat(file.fileno())
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UsageError(f"{self.path}: damaged gzip file ({error}); fetch it again") from None
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"{self.path}: cannot be read ({reason})") from None
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            self._raise_changed()
        yield b""

    def _watched_blocks(self, file: BinaryIO, size: int) -> Iterator[bytes]:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if self.path.suffix.lower() == ".gz" and not packed:
            raise UsageError(f"{self.path}: named .gz, but not a gzip file")
        stream: Any = gzip.GzipFile(fileobj=file) if packed else file
        told = 0
        while data := stream.read(READ_BYTES):
            position = file.tell()
            if position > size:  # checked as it is read: a log may grow faster than we read
                self._raise_changed()
            if self.on_bytes is not None:
                self.on_bytes(position - told)
                told = position
            yield data

    def _raise_changed(self) -> NoReturn:
        raise UsageError(f"{self.path}: changed while it was read; wait until it is whole")


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
                f"{where}: half a surrogate pair in field {name!r}; mend it, or "
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


# ------------------------------------------------------------------------------- the tokenizer


class Tokenizer:
    """A SentencePiece vocabulary, from a file, from its bytes, or the embedded one.

    `max_len` cuts what `encode` returns, before BOS and EOS. Raises UsageError naming a file that
    is missing or holds no SentencePiece model.
    """

    def __init__(
        self, max_len: int | None = None, tokenizer_model: str | Path | bytes | None = None
    ) -> None:
        given = EMBEDDED_VOCABULARY if tokenizer_model is None else tokenizer_model
        self.max_len = max_len
        self.model_bytes = given if isinstance(given, bytes) else _read_model(Path(given))
        name = "the vocabulary" if isinstance(given, bytes) else str(given)
        self.sp_model = _load_model(self.model_bytes, name)
        self.fingerprint = fingerprint(self.model_bytes)
        self.n_words: int = self.sp_model.vocab_size()
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UsageError(f"{name}: has no BOS or no EOS token, which mark documents here")
        zero = self.sp_model.piece_to_id("<0x00>")  # the original pads with this byte token
        self.pad_id: int = zero if self.sp_model.is_byte(zero) else 0

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Token ids of `s`, cut to `max_len`, with BOS and EOS as asked."""
        ids = self.sp_model.encode(s)[: self.max_len]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; BOS and EOS have none."""
        return self.sp_model.decode([int(i) for i in ids])

    def token_byte_lengths(self) -> np.ndarray:
        """(n_words,) int64: bytes of UTF-8 that each token stands for; 0 for control tokens."""
        sp = self.sp_model
        return np.array(
            [
                0 if sp.is_control(i) else 1 if sp.is_byte(i) else _piece_bytes(sp.id_to_piece(i))
                for i in range(self.n_words)
            ],
            dtype=np.int64,
        )

    def spelt_in_bytes(self, tokens: np.ndarray) -> float:
        """The share of the bytes of some tokens' text that have a byte token each, from 0 to 1.

        Such tokens stand for characters that the vocabulary has no piece for.
        """
        counts = np.bincount(tokens, minlength=self.n_words)
        bytes_of = counts * self.token_byte_lengths()
        alone = [i for i in range(self.n_words) if self.sp_model.is_byte(i)]
        return float(bytes_of[alone].sum() / max(1, bytes_of.sum()))


def vocabulary_remedy(size: int) -> str:
    """What to do about a model file without its vocabulary of `size` pieces."""
    remedy = f"name its SentencePiece file of {size:,} pieces with --tokenizer_model"
    if size == LLAMA2_PIECES:
        remedy += "; Llama-2's is fetched by: python data/download.py tokenizer"
    return remedy


def _piece_bytes(piece: str) -> int:
    return len(piece.replace(SPACE, " ").encode())


def _read_model(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        hint = _download_hint(path)
        raise UsageError(
            f"--tokenizer_model {path}: no such file" + (f"; {hint}" if hint else "")
        ) from None
    except OSError as error:
        raise UsageError(f"--tokenizer_model {path}: cannot be read ({error.strerror})") from None


def _load_model(data: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
        if processor.vocab_size() < 1:
            raise ValueError("no pieces")
    except (RuntimeError, ValueError, TypeError, OSError):
        raise UsageError(f"{name}: not a SentencePiece model ({len(data):,} bytes)") from None
    return processor


# ------------------------------------------------------------------------------- training one

TRAINING_BYTES = 64 << 20  # of text, sampled evenly from the inputs: bounds memory and time
SENTENCE_CHARS = 4096  # SentencePiece drops longer sentences than its limit; these stay below


def train_vocabulary(
    inputs: Sequence[Path],
    output: Path,
    *,
    vocab_size: int,
    character_coverage: float = 0.9995,
    text_field: str = "text",
    encoding_errors: str = "strict",
    sentences_only: bool = False,
    max_bytes: int = TRAINING_BYTES,
    seed: int = 0,
) -> None:
    """Train a byte-fallback BPE vocabulary with Llama-2's conventions and publish it at `output`.

    The same inputs and options give the same bytes: the file holds no path and no date. At most
    `max_bytes` of text are used, sampled by `seed`. Raises UsageError, naming the largest (or the
    smallest) size that works, when `vocab_size` does not fit the corpus.
    """
    reading = Reading(
        text_field=text_field, encoding_errors=encoding_errors, sentences_only=sentences_only
    )
    sentences = _sample_sentences(inputs, reading, max_bytes=max_bytes, seed=seed)
    if not sentences:
        raise UsageError(f"{', '.join(map(str, inputs))}: no text to train a vocabulary on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * SENTENCE_CHARS,
            num_threads=16,  # part of the file: a fixed number keeps it the same on all machines
            minloglevel=2,
        )
    except RuntimeError as error:
        _raise_training_error(str(error), vocab_size)
    publish(output, model.getvalue())


def _raise_training_error(message: str, vocab_size: int) -> NoReturn:
    given = f"--vocab_size {vocab_size}"
    if largest := re.search(r"value <= (\d+)", message):
        raise UsageError(
            f"{given}: too large for this text, which gives at most {largest[1]}; use a smaller "
            "one or more text"
        )
    if smallest := re.search(r"\d+ vs (\d+)", message):
        raise UsageError(
            f"{given}: too small for this text's characters and the 256 bytes: at least "
            f"{smallest[1]}, or a lower --character_coverage"
        )
    raise UsageError(f"{given}: SentencePiece could not train ({message})")


def _sample_sentences(
    inputs: Sequence[Path], reading: Reading, *, max_bytes: int, seed: int
) -> list[str]:
    """Lines of the inputs, each kept with the same probability, of about `max_bytes` in all."""
    # A .gz unpacks to about four times its size; what a wrong guess adds, the hard limit ends.
    sizes = (p.stat().st_size * (4 if p.suffix.lower() == ".gz" else 1) for p in inputs)
    share = max_bytes / max(1, sum(sizes))
    coin = random.Random(seed)
    kept: list[str] = []
    room = max_bytes * 5 // 4
    for path in inputs:
        for sentence in _sentences(read_documents(path, reading)):
            if share < 1 and coin.random() >= share:
                continue
            room -= len(sentence.encode())
            if room < 0:
                return kept
            kept.append(sentence)
    return kept


def _sentences(blocks: Iterable[Block]) -> Iterator[str]:
    """The lines of documents, long ones cut, at a space where there is one."""
    held = ""
    for block in blocks:
        *lines, held = (held + block.text).split("\n")
        if block.ends or len(held) > READ_BYTES:  # a line without end is cut where it stands
            lines, held = [*lines, held], ""
        for line in lines:
            while len(line) > SENTENCE_CHARS:
                cut = line.rfind(" ", 1, SENTENCE_CHARS)
                cut = cut if cut > 0 else SENTENCE_CHARS
                yield line[:cut]
                line = line[cut:].removeprefix(" ")
            if line and not line.isspace():
                yield line


# ------------------------------------------------------------------------------- encoding in pieces

# Normalisers that come with SentencePiece. None has a rule that reaches from a printable ASCII
# character over a space, or turns such a character into anything but itself or its lower case.
KNOWN_NORMALIZERS = ("identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")
PART_CHARS = 1 << 16  # cut longer documents into parts of about this many characters
BATCH_CHARS = 1 << 21  # encode this many at a time: enough work for the threads, little memory
LOOK_UP_SPEED = 2.5  # of one thread looking words up, in threads of SentencePiece, to begin with
WORD_CACHE_ENTRIES = 1 << 19
WORD_CACHE_CHARS = 64  # a longer word hardly comes twice
BPE = 2  # ModelType in SentencePiece's protocol


class SafeCuts:
    """Where a text may be cut so that the parts' ids, one after the other, are the whole text's.

    BPE joins neighbours only into pieces of the vocabulary, so nothing joins across two characters
    that stand side by side in no piece, and the two sides cannot influence each other. With an
    identity normaliser every such place is a cut; with the other known normalisers only one before
    a space that follows a printable ASCII character. Elsewhere (a unigram vocabulary, whose float
    sums depend on all the text before; pieces that end in spaces; a custom normaliser) nothing is.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        sp, facts = tokenizer.sp_model, _model_facts(tokenizer.model_bytes)
        pieces = [sp.id_to_piece(i) for i in range(tokenizer.n_words) if not sp.is_byte(i)]
        pairs = {piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1)}
        spelt = {pair.replace(SPACE, " ") for pair in pairs}  # text has a space or the sign itself
        mixed = {SPACE + " ", " " + SPACE} if 2 * SPACE in pairs else set()
        self.joined = pairs | spelt | mixed
        singles = {piece for piece in pieces if len(piece) == 1}
        # Without byte fallback a run of unknown characters is one unknown token: never cut there.
        singles |= {" "} if SPACE in singles else set()
        self.known = None if facts.byte_fallback else singles
        known_rules = facts.normalizer in KNOWN_NORMALIZERS or not facts.has_rules
        cuts = facts.model_type == BPE and known_rules and facts.escapes and not facts.space_last
        self.anywhere = cuts and not facts.has_rules and not facts.trims
        self.at_spaces = cuts and not self.anywhere
        self.spaces_start_words = not any(p[1] == SPACE != p[0] for p in pairs)
        self.newline_alone = not any("\n" in pair for pair in pairs)
        self.adds_space = facts.adds_space
        self.byte_fallback = facts.byte_fallback

    def find(self, text: str, start: int) -> int:
        """The first cut at or after `start` >= 1, between text[cut-1] and text[cut]; 0 for none."""
        if self.anywhere:
            for cut in range(start, len(text)):
                if text[cut - 1 : cut + 1] not in self.joined and self._one_known(text, cut):
                    return cut
        elif self.at_spaces:
            cut = text.find(" ", start)
            while cut > 0:
                left = text[cut - 1]
                joins = left + " " in self.joined or left.lower() + " " in self.joined
                if "!" <= left <= "~" and not joins and self._one_known(text, cut):
                    return cut
                cut = text.find(" ", cut + 1)
        return 0

    def _one_known(self, text: str, cut: int) -> bool:
        return self.known is None or text[cut - 1] in self.known or text[cut] in self.known


class EncodedPart(NamedTuple):
    """Ids of a stretch of one document, without BOS and EOS."""

    ids: np.ndarray  # (n,) in the encoder's dtype
    utf8_bytes: int  # of the text
    starts: bool  # the document's first part
    ends: bool  # and its last


class _Part(NamedTuple):
    left: str  # the character before it in its document; "" at the start
    text: str
    starts: bool
    ends: bool


class DocumentEncoder:
    """Streams documents into ids, exactly those of encoding each document whole.

    One thread looks words up in a cache of what they encode to. Others run SentencePiece, which
    needs no Python meanwhile, on the rest of each batch; which parts they get, by how fast both
    were before, decides the speed and nothing else. Where no cut is safe a document is encoded
    whole.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        threads: int | None = None,
        part_chars: int = PART_CHARS,
        batch_chars: int = BATCH_CHARS,
        word_cache: bool = True,
    ) -> None:
        self.sp_model = tokenizer.sp_model
        self.threads = threads or os.cpu_count() or 1
        self.part_chars, self.batch_chars = part_chars, batch_chars
        self.dtype = np.dtype(np.uint16 if tokenizer.n_words <= 1 << 16 else np.uint32)
        self.cuts = cuts = SafeCuts(tokenizer)
        self.newline_id = (tokenizer.sp_model.encode("\n") or [0])[-1]
        self.words: dict[str, bytes] = {}
        can_cache = (
            cuts.anywhere and cuts.byte_fallback and cuts.spaces_start_words and cuts.newline_alone
        )
        self.word_cache = can_cache and word_cache
        self.look_up_share = LOOK_UP_SPEED / (LOOK_UP_SPEED + self.threads - 1)  # of a batch
        self._anchor_lengths = {"": 0}

    def encode(self, blocks: Iterable[Block]) -> Iterator[list[EncodedPart]]:
        """Batches of encoded parts, in order."""
        batch, size = [], 0
        with ThreadPoolExecutor(max_workers=1) as helper:
            for part in self._parts(blocks):
                batch.append(part)
                size += len(part.text) + 16  # an empty part costs something too
                if size >= self.batch_chars:
                    yield self._encode_batch(batch, helper)
                    batch, size = [], 0
            if batch:
                yield self._encode_batch(batch, helper)

    def _parts(self, blocks: Iterable[Block]) -> Iterator[_Part]:
        pending, size, enough, left = [], 0, self.part_chars, ""
        for block in blocks:
            pending.append(block.text)
            size += len(block.text)
            if size < enough and not block.ends:
                continue
            text = "".join(pending)
            at, starts = 0, not left
            while len(text) - at > self.part_chars:
                cut = self.cuts.find(text, at + self.part_chars)
                if not cut:
                    break
                yield _Part(left, text[at:cut], starts, False)
                at, left, starts = cut, text[cut - 1], False
            rest = text[at:]
            if block.ends:
                yield _Part(left, rest, starts, True)
                rest, left = "", ""
            pending, size = [rest], len(rest)
            enough = 2 * max(self.part_chars, size)  # doubling: a text without cuts costs no square

    def _encode_batch(self, parts: list[_Part], helper: ThreadPoolExecutor) -> list[EncodedPart]:
        if not self.word_cache:
            arrays = self._encode_parts(parts, self.threads)
        elif self.threads == 1:
            arrays = self._look_up(parts)
        else:
            arrays = self._share_out(parts, helper)
        return [
            EncodedPart(ids, _utf8_bytes(part.text), part.starts, part.ends)
            for part, ids in zip(parts, arrays, strict=True)
        ]

    def _share_out(self, parts: list[_Part], helper: ThreadPoolExecutor) -> list[np.ndarray]:
        ends = np.cumsum([len(part.text) + 1 for part in parts])
        cut = int(np.searchsorted(ends, self.look_up_share * ends[-1], side="right"))
        start = time.perf_counter()

        def encode_rest() -> tuple[list[np.ndarray], float]:
            rest = self._encode_parts(parts[cut:], self.threads - 1)
            return rest, time.perf_counter() - start

        future = helper.submit(encode_rest)
        found = self._look_up(parts[:cut])
        seconds = time.perf_counter() - start
        rest, rest_seconds = future.result()
        if 0 < cut < len(parts):
            size = ends[cut - 1]
            speed, rest_speed = size / seconds, (ends[-1] - size) / rest_seconds
            share = speed / (speed + rest_speed)
            self.look_up_share = min(0.95, max(0.05, (self.look_up_share + share) / 2))
        return found + rest

    def _encode_parts(self, parts: list[_Part], threads: int) -> list[np.ndarray]:
        # The character before a part goes in front of it, so that a normaliser does with the part
        # what it does inside the document (no space put before it); its ids come off again.
        encoded = _encode_many(self.sp_model, [p.left + p.text for p in parts], threads)
        return [
            ids[self._anchor_length(part.left) :].astype(self.dtype)
            for part, ids in zip(parts, encoded, strict=True)
        ]

    def _anchor_length(self, left: str) -> int:
        if left not in self._anchor_lengths:
            self._anchor_lengths[left] = len(self.sp_model.encode(left))
        return self._anchor_lengths[left]

    def _look_up(self, parts: list[_Part]) -> list[np.ndarray]:
        if not parts:
            return []
        first = " " if self.cuts.adds_space else ""  # what the vocabulary itself puts in front
        texts = [first + part.text if part.starts else part.text for part in parts]
        # Many short documents without newlines become one text: a call a document costs more.
        joined = len(texts) > 1 and not any("\n" in text for text in texts)
        split = [_split_words(text) for text in (["\n".join(texts)] if joined else texts)]
        missing = list(set().union(*split).difference(self.words))
        self._learn(missing)
        look_up = self.words.__getitem__
        arrays = [np.frombuffer(b"".join(map(look_up, w)), dtype=self.dtype)[1:] for w in split]
        self._trim_cache(missing)
        return self._split_lines(arrays[0]) if joined else arrays

    def _split_lines(self, ids: np.ndarray) -> list[np.ndarray]:
        edges = [-1, *np.flatnonzero(ids == self.newline_id).tolist(), len(ids)]
        return [ids[start + 1 : stop] for start, stop in pairwise(edges)]

    def _learn(self, words: list[str]) -> None:
        # A newline joins with nothing and is one token, so what the words stand for can be encoded
        # as the lines of a text: one call, where a call a word costs as much as the encoding.
        newline = self.dtype.type(self.newline_id).tobytes()
        count = 4 * self.threads
        groups = [group for i in range(count) if (group := words[i::count])]
        texts = ["".join(w if w[:1] == "\n" else f"\n {w}" for w in group) for group in groups]
        encoded = _encode_many(self.sp_model, texts, self.threads)
        for group, ids in zip(groups, encoded, strict=True):
            lines = self._split_lines(ids.astype(self.dtype))[1:]
            for word, line in zip(group, lines, strict=True):
                self.words[word] = newline * (word[:1] == "\n") + line.tobytes()

    def _trim_cache(self, new: list[str]) -> None:
        if len(self.words) > WORD_CACHE_ENTRIES:
            self.words.clear()
            return
        for word in new:
            if len(word) > WORD_CACHE_CHARS:
                del self.words[word]


def _split_words(text: str) -> list[str]:
    """The words of `text` after a newline put in front of it; all cuts between are safe.

    A word stands for a space and itself, or begins with a newline and stands for itself alone. Of
    several spaces in a row, which a vocabulary may join, all but the first are spelt as its sign
    for a space and belong to the word. By str.split, three times as fast as a regular expression.
    """
    text = text.replace("  ", f" {SPACE}").replace(f"{SPACE} ", 2 * SPACE)
    return f"\n{text}".replace("\n", " \n").split(" ")[1:]


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _encode_many(
    sp_model: sentencepiece.SentencePieceProcessor, texts: list[str], threads: int
) -> list[np.ndarray]:
    if not texts:
        return []
    if hasattr(sp_model, "EncodeAsNumpy"):  # since 0.2.2: no Python object a token
        return sp_model.encode(texts, num_threads=threads, return_type="numpy")
    return [np.array(ids, np.int32) for ids in sp_model.encode(texts, num_threads=threads)]


# The few fields of a SentencePiece model that its Python interface does not tell.


class _ModelFacts(NamedTuple):
    model_type: int
    byte_fallback: bool
    space_last: bool  # the added space goes behind the text
    normalizer: str
    has_rules: bool
    adds_space: bool
    trims: bool  # removes spaces at the ends and doubled ones
    escapes: bool


def _model_facts(model_bytes: bytes) -> _ModelFacts:
    # Field numbers of sentencepiece_model.proto: 2 trainer_spec, 3 normalizer_spec.
    specs = {n: value for n, value in _proto_fields(model_bytes) if n in (2, 3)}
    trainer = dict(_proto_fields(specs.get(2, b"")))
    normalizer = dict(_proto_fields(specs.get(3, b"")))
    return _ModelFacts(
        model_type=trainer.get(3, 1),
        byte_fallback=bool(trainer.get(35, 0)),
        space_last=bool(trainer.get(24, 0)),
        normalizer=bytes(normalizer.get(1, b"")).decode("utf-8", "replace"),
        has_rules=bool(normalizer.get(2, b"")),
        adds_space=bool(normalizer.get(3, 1)),
        trims=bool(normalizer.get(4, 1)),
        escapes=bool(normalizer.get(5, 1)),
    )


def _proto_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer message: ints, or bytes for all else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        else:
            size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at : at + size], at + size
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


# ------------------------------------------------------------------------------- llama2.c's format


def export_tokenizer_bin(tokenizer: Tokenizer, path: Path) -> None:
    """Write the vocabulary as llama2.c's `tokenizer.bin`.

    Little-endian: uint32 longest token in bytes; per token float32 score, int32 length, bytes.
    Byte tokens keep their name `<0x0A>`, which llama2.c parses; BOS and EOS stand in newlines.
    """
    sp = tokenizer.sp_model
    named = {tokenizer.bos_id: "\n<s>\n", tokenizer.eos_id: "\n</s>\n"}
    names = [named.get(i, sp.id_to_piece(i)) for i in range(tokenizer.n_words)]
    tokens = [name.replace(SPACE, " ").encode() for name in names]
    entries = [
        struct.pack("<fi", sp.get_score(i), len(token)) + token for i, token in enumerate(tokens)
    ]
    publish(path, struct.pack("<I", max(map(len, tokens))) + b"".join(entries))


# ------------------------------------------------------------------------------- command line


def _build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="tokenizer.py", description="Train or export a vocabulary.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)
    train = commands.add_parser("train", help="train a SentencePiece vocabulary on text")
    train.add_argument(
        "--input", nargs="+", required=True, help="files, folders and globs: .txt, .jsonl, .gz"
    )
    train.add_argument("--output", type=Path, required=True, help="the model file to write")
    train.add_argument("--vocab_size", type=int, default=4096, help="tokens (default 4096)")
    train.add_argument(
        "--character_coverage",
        type=float,
        default=0.9995,
        help="share of characters that get tokens; the rest are spelt in bytes (default 0.9995)",
    )
    train.add_argument("--text_field", default="text", help="of .jsonl files (default text)")
    train.add_argument("--encoding_errors", choices=("strict", "replace"), default="strict")
    train.add_argument(
        "--sentences_only", action="store_true", help="only the sentences of labelled files"
    )
    export = commands.add_parser("export", help="write llama2.c's tokenizer.bin")
    export.add_argument("--tokenizer_model", type=Path, help="default: the embedded vocabulary")
    export.add_argument("--output", type=Path, required=True, help="the file to write")
    for command in (train, export):
        command.add_argument("--overwrite", action="store_true", help="replace the output file")
    return parser


def _train_command(args: argparse.Namespace) -> None:
    if args.vocab_size < 1:
        raise UsageError(f"--vocab_size {args.vocab_size}: must be at least 1")
    if not 0.98 <= args.character_coverage <= 1:  # SentencePiece's own limits
        raise UsageError(f"--character_coverage {args.character_coverage}: must be from 0.98 to 1")
    train_vocabulary(
        find_text_files(args.input, flag="--input"),
        args.output,
        vocab_size=args.vocab_size,
        character_coverage=args.character_coverage,
        text_field=args.text_field,
        encoding_errors=args.encoding_errors,
        sentences_only=args.sentences_only,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 after one line about bad input."""
    given = sys.argv[1:] if argv is None else argv
    try:
        args = _build_parser().parse_args([with_underscores(argument) for argument in given])
        if args.output.exists() and not args.overwrite:
            raise UsageError(f"--output {args.output}: is there already; --overwrite replaces it")
        if args.command == "train":
            _train_command(args)
            tokenizer = Tokenizer(tokenizer_model=args.output)
        else:
            tokenizer = Tokenizer(tokenizer_model=args.tokenizer_model)
            export_tokenizer_bin(tokenizer, args.output)
    except UsageError as error:
        report_usage_error("tokenizer.py", error)
        return 2
    size = args.output.stat().st_size
    print(f"{args.output}: {tokenizer.n_words:,} tokens, {size:,} bytes, {tokenizer.fingerprint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
