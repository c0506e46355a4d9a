"""Text to token ids: documents encoded as a stream, and the cache of the ids on disk.

A corpus may be far larger than memory. Its ids are exactly those of encoding each document whole,
and the cache is memory-mapped, checked, and keyed by all that the ids depend on. Knows nothing of
tensors, chunks or models.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
import tempfile
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from minllama.cli.console import progress_bar
from minllama.system.errors import Interrupted, TextLost, UsageError
from minllama.system.files import READ_BYTES, atomic_write, remove_temporaries
from minllama.system.locks import Busy, hold
from minllama.text.reading import Block, Reading, read_documents
from tokenizer import SPACE, Tokenizer

# ---------------------------------------------------------------------------- encoding

WORD_CACHE_SPEED = 2.5  # characters per second, relative to one thread of SentencePiece
WORD_CACHE_ENTRIES = 1 << 19
WORD_CACHE_CHARS = 64  # a longer word hardly comes twice
# Where a text may be cut: before a newline, and at a single space, which the right part gets back
# as the space that SentencePiece puts before every text.
CUT = re.compile(rf"\n|(?<=[^ {SPACE}]) (?=[^ {SPACE}])")


class EncodedPart(NamedTuple):
    """Ids of a stretch of one document, without BOS and EOS."""

    ids: np.ndarray  # (n,) in the encoder's dtype
    utf8_bytes: int  # of the text
    starts: bool  # the document's first part
    ends: bool  # and its last


class _Part(NamedTuple):
    text: str
    cut_at: str  # the character before it at which the document was cut: "", "\n" or " "
    ends: bool  # the document's last part


class DocumentEncoder:
    """Streams documents into ids, exactly those of encoding each document whole.

    BPE merges neighbours only into pieces of the vocabulary. Where no piece joins a newline to
    anything or holds a space behind another character, a text can be cut at newlines and words
    without changing its ids; then one thread looks up what each word encodes to, and the others
    run SentencePiece, which releases the GIL, on the rest of each batch. With any other vocabulary
    a document is encoded whole.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        threads: int | None = None,
        part_chars: int = 1 << 16,  # longer documents are cut into parts of about this many
        batch_chars: int = 1 << 21,  # encoded at a time: work for the threads, little memory
    ) -> None:
        sp = self.sp_model = tokenizer.sp_model
        self.threads = threads or os.cpu_count() or 1
        self.part_chars, self.batch_chars = part_chars, batch_chars
        self.dtype = np.dtype("<u2" if tokenizer.n_words <= 1 << 16 else "<u4")
        pieces = [sp.id_to_piece(i) for i in range(tokenizer.n_words) if not sp.is_byte(i)]
        self.has_safe_cuts = tokenizer.is_plain_bpe and not any(
            ("\n" in piece and piece != "\n") or SPACE in piece.lstrip(SPACE) for piece in pieces
        )
        self.newline_id = (sp.encode("\n") or [0])[-1]
        self.prefix_length = len(sp.encode("\n")) - 1  # ids of the space put before every text
        self.words: dict[str, bytes] = {}

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
        pending, size, enough, cut_at = [], 0, self.part_chars, ""
        for block in blocks:
            pending.append(block.text)
            size += len(block.text)
            if size < enough and not block.ends:
                continue
            text, start = "".join(pending), 0
            while self.has_safe_cuts and len(text) - start > self.part_chars:
                cut = CUT.search(text, start + self.part_chars)
                if cut is None:
                    break
                yield _Part(text[start : cut.start()], cut_at, False)
                cut_at = cut[0]
                start = cut.start() if cut_at == "\n" else cut.end()
            text = text[start:]
            if block.ends:
                yield _Part(text, cut_at, True)
                text, cut_at = "", ""
            pending, size = [text], len(text)
            enough = 2 * max(self.part_chars, size)  # doubling: a text without cuts stays linear

    def _encode_batch(self, parts: list[_Part], helper: ThreadPoolExecutor) -> list[EncodedPart]:
        looked_up = 0
        if self.has_safe_cuts:
            share = WORD_CACHE_SPEED / (WORD_CACHE_SPEED + self.threads - 1)
            ends = np.cumsum([len(part.text) + 1 for part in parts])
            looked_up = int(np.searchsorted(ends, share * ends[-1], side="right"))
        rest = helper.submit(self._encode_parts, parts[looked_up:])
        arrays = self._look_up(parts[:looked_up]) + rest.result()
        encoded = []
        for part, ids in zip(parts, arrays, strict=True):
            size = len(part.text.encode()) + (part.cut_at == " ")  # with the space it was cut at
            encoded.append(EncodedPart(ids, size, not part.cut_at, part.ends))
        return encoded

    def _encode_parts(self, parts: list[_Part]) -> list[np.ndarray]:
        threads = max(1, self.threads - self.has_safe_cuts)
        encoded = _encode_many(self.sp_model, [part.text for part in parts], threads)
        return [
            ids[self.prefix_length if part.cut_at == "\n" else 0 :].astype(self.dtype)
            for part, ids in zip(parts, encoded, strict=True)
        ]

    def _look_up(self, parts: list[_Part]) -> list[np.ndarray]:
        texts = [part.text if part.cut_at == "\n" else f" {part.text}" for part in parts]
        # Many short documents without newlines become one text: a call per document costs more.
        joined = len(texts) > 1 and not any("\n" in text for text in texts)
        split = [_split_words(text) for text in (["\n".join(texts)] if joined else texts)]
        missing = list(set().union(*split).difference(self.words))
        self._learn(missing)
        look_up = self.words.__getitem__
        arrays = [np.frombuffer(b"".join(map(look_up, w)), dtype=self.dtype)[1:] for w in split]
        if len(self.words) > WORD_CACHE_ENTRIES:
            self.words.clear()
        for word in missing:
            if len(word) > WORD_CACHE_CHARS:
                self.words.pop(word, None)
        return self._split_lines(arrays[0]) if joined else arrays

    def _split_lines(self, ids: np.ndarray) -> list[np.ndarray]:
        edges = [-1, *np.flatnonzero(ids == self.newline_id).tolist(), len(ids)]
        return [ids[start + 1 : stop] for start, stop in pairwise(edges)]

    def _learn(self, words: list[str]) -> None:
        # As the lines of a few texts: one call per word would cost as much as the encoding.
        newline = np.array(self.newline_id, self.dtype).tobytes()
        groups = [words[i :: 4 * self.threads] for i in range(min(len(words), 4 * self.threads))]
        texts = ["".join(w if w[:1] == "\n" else f"\n {w}" for w in group) for group in groups]
        encoded = _encode_many(self.sp_model, texts, self.threads)
        for group, ids in zip(groups, encoded, strict=True):
            lines = self._split_lines(ids.astype(self.dtype))[1:]
            for word, line in zip(group, lines, strict=True):
                self.words[word] = newline * (word[:1] == "\n") + line.tobytes()


def _split_words(text: str) -> list[str]:
    """The words of `text` after a newline put in front of it.

    "a b\\nc" gives ["\\na", "b", "\\nc"]: a word without a newline had a space before it. Of
    several spaces in a row, which a vocabulary may join, all but the first are spelt as SPACE and
    belong to the word. By str.split, three times as fast as a regular expression.
    """
    text = text.replace("  ", f" {SPACE}").replace(f"{SPACE} ", 2 * SPACE)
    return f"\n{text}".replace("\n", " \n").split(" ")[1:]


def _encode_many(sp_model, texts: list[str], threads: int) -> list[np.ndarray]:
    if hasattr(sp_model, "EncodeAsNumpy"):  # since 0.2.2: no Python object per token
        return sp_model.encode(texts, num_threads=threads, return_type="numpy")
    return [np.array(ids, np.int32) for ids in sp_model.encode(texts, num_threads=threads)]


# ---------------------------------------------------------------------------- the token cache

# File: header, tokens, zeros to a multiple of 8, (documents, 2) int64 of first token and bytes of
# UTF-8, (files, 2) int64 of tokens and documents, (documents, 2) uint64 of the 16-byte BLAKE2b of
# each document's ids; all little-endian. The header has the SHA-256 of all but these, the key, that
# of these, and ends in a CRC-32 of itself.
MAGIC = b"MLTOKENS"
CACHE_VERSION = 3
HEADER = struct.Struct("<8sIIQQQ32s32s32sI")
# How shortly before it is read a file may change again without another time stamp: those of most
# file systems advance every few milliseconds, FAT's every two seconds.
FINE_NS, COARSE_NS = 20_000_000, 2_000_000_000
LARGE_BYTES = 1 << 30  # of a cache: checking it takes a second or more


class BadCache(Exception):
    """Why a cache file cannot be used; it is rebuilt."""


class StoredTokens:
    """The tokens in a cache's file, (count,), read as slices of them are asked for.

    Not mapped: to touch a mapped page of a file that somebody cut off kills the process. Raises
    TextLost where the file is no longer what was opened.
    """

    def __init__(self, path: Path, file: BinaryIO, dtype: np.dtype, count: int) -> None:
        self.path, self.file, self.dtype, self.count = path, file, dtype, count
        self.stamp, self.lock = self._stamp(), threading.Lock()  # for one place in the file
        weakref.finalize(self, file.close)  # also at the interpreter's end

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.count)
        found = np.empty(max(0, stop - start), self.dtype)
        try:
            view, read = memoryview(found.view(np.uint8)), 0
            with self.lock:
                self.file.seek(HEADER.size + start * self.dtype.itemsize)
                while read < len(view) and (got := self.file.readinto(view[read:])):
                    read += got
            if read == len(view) and self._stamp() == self.stamp:
                return found
            reason = "was cut off or written over"
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
        raise TextLost(f"the token cache {self.path} {reason} while the run was reading it")

    def _stamp(self) -> tuple[int, int]:
        stat = os.fstat(self.file.fileno())
        return stat.st_size, stat.st_mtime_ns


class TokenCache:
    """The tokens of a corpus on disk: every document between BOS and EOS, in order.

    tokens (n,) uint16 or uint32; document_starts, document_bytes (documents,) int64, the latter of
    UTF-8 text; file_tokens, file_documents (files,) int64. `key` is the SHA-256 of them all.
    fingerprints (documents, 2) uint64 are alike where documents are.
    `rebuilt_because` is None for a cache that was found valid. Raises BadCache for one that is
    stale, damaged or absent.
    """

    def __init__(
        self,
        path: Path,
        *,
        signature: bytes | None = None,
        verify: bool = True,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.path = path
        self.rebuilt_because: str | None = None
        self.token_byte_lengths: np.ndarray | None = None  # set by build_or_load
        if not path.is_file():
            raise BadCache("there was none")
        with contextlib.ExitStack() as opened:
            try:
                file = opened.enter_context(path.open("rb", buffering=0))
                self._open(path, file, signature, verify, should_stop)
            except OSError as error:
                raise BadCache(f"it cannot be read ({error.strerror})") from None
            opened.pop_all()  # the tokens keep it open

    def _open(
        self,
        path: Path,
        file: BinaryIO,
        signature: bytes | None,
        verify: bool,
        should_stop: Callable[[], bool],
    ) -> None:
        data, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
        if len(data) < HEADER.size or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise BadCache("it is damaged (its header is wrong)")
        fields = HEADER.unpack(data)
        magic, version, width, n_tokens, n_documents, n_files, self.key, others, made_of, _ = fields
        if magic != MAGIC or version != CACHE_VERSION or width not in (2, 4):
            raise BadCache("it is not a token cache of this version")
        if signature not in (None, made_of):
            if any(made_of):
                raise BadCache("the text, the vocabulary or the reading options changed")
            raise BadCache("the text had just been changed when it was read")
        tokens_end = HEADER.size + width * n_tokens
        documents_at = tokens_end + -tokens_end % 8
        files_at = documents_at + 16 * n_documents
        fingerprints_at = files_at + 16 * n_files
        if size != fingerprints_at + 16 * n_documents:
            raise BadCache("it is damaged (its size is wrong)")
        self.tokens = StoredTokens(path, file, np.dtype(f"<u{width}"), n_tokens)
        edges = (HEADER.size, fingerprints_at, size)
        if verify and _digests(file, edges, should_stop) != [self.key, others]:
            raise BadCache("it is damaged (its checksum is wrong)")
        raw = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        documents = raw[documents_at:files_at].view("<i8").reshape(-1, 2)
        files = raw[files_at:fingerprints_at].copy().view("<i8").reshape(-1, 2)
        self.document_starts, self.document_bytes = documents[:, 0], documents[:, 1]
        self.file_tokens, self.file_documents = files[:, 0], files[:, 1]
        self.fingerprints = raw[fingerprints_at:].view("<u8").reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.tokens)

    def document_stops(self) -> np.ndarray:
        """(documents,) int64: one past each document's EOS."""
        return np.append(self.document_starts[1:], len(self.tokens))

    def place(self, position: int) -> tuple[int, int]:
        """(file, token of that file) of token `position`."""
        ends = np.cumsum(self.file_tokens)
        file = int(np.searchsorted(ends, position, side="right"))
        return file, position - int(ends[file] - self.file_tokens[file])


def _digests(file: BinaryIO, edges: Sequence[int], should_stop: Callable[[], bool]) -> list[bytes]:
    """The SHA-256 of what is between one place of a file and the next."""
    size, digests = edges[-1], []
    with _byte_bar("checking", size, size > LARGE_BYTES) as bar:
        for start, stop in pairwise(edges):
            digest = hashlib.sha256()
            file.seek(start)
            while left := stop - file.tell():
                data = file.read(min(READ_BYTES, left))  # not mapped: that counts as our memory
                if not data:
                    break  # cut off meanwhile
                digest.update(data)
                bar.update(len(data))
                if should_stop():
                    raise Interrupted
            digests.append(digest.digest())
    return digests


def _write_cache(
    file: BinaryIO,
    table: BinaryIO,
    batches: Iterable[list[EncodedPart]],
    file_documents: list[int],
    marks: np.ndarray,
    signature: bytes,
    should_stop: Callable[[], bool],
) -> None:
    """Stream a cache's tokens into a file, then its tables and header.

    `table` is a temporary file for what is told of each document and follows the tokens: that of a
    corpus with a document per line has gigabytes. `file_documents` grows with the `batches`;
    `marks` are BOS and EOS, (2, 1), in the dtype of the tokens.
    """
    digest, n_tokens, open_bytes = hashlib.sha256(), 0, 0
    fingerprint = hashlib.blake2b()

    def write(data: bytes) -> None:
        digest.update(data)
        file.write(data)

    def write_column(of_row: slice) -> None:
        table.seek(0)
        while data := table.read(READ_BYTES):
            write(np.frombuffer(data, "<u8").reshape(-1, 4)[:, of_row].tobytes())

    file.write(bytes(HEADER.size))
    for parts in batches:
        arrays, rows = [], []
        for part in parts:
            if part.starts:
                arrays.append(marks[0])
                rows.append(n_tokens.to_bytes(8, "little"))
                open_bytes, fingerprint = 0, hashlib.blake2b(digest_size=16)
            arrays.append(part.ids)
            open_bytes += part.utf8_bytes
            fingerprint.update(part.ids.tobytes())
            if part.ends:
                arrays.append(marks[1])
                rows += (open_bytes.to_bytes(8, "little"), fingerprint.digest())
            n_tokens += part.starts + len(part.ids) + part.ends
        write(np.concatenate(arrays, dtype=marks.dtype).tobytes())
        table.write(b"".join(rows))
        if should_stop():
            raise Interrupted
    write(bytes(-file.tell() % 8))
    starts = []  # of each file, and the end
    for first in np.cumsum([0, *file_documents]).tolist():
        table.seek(32 * first)
        start = table.read(8)  # nothing after the last document
        starts.append(int.from_bytes(start, "little") if start else n_tokens)
    write_column(slice(2))
    write(np.stack([np.diff(starts), file_documents], axis=1).astype("<i8").tobytes())
    key, digest = digest.digest(), hashlib.sha256()
    write_column(slice(2, 4))
    counts = (n_tokens, sum(file_documents), len(file_documents))
    fields = (MAGIC, CACHE_VERSION, marks.itemsize, *counts, key, digest.digest(), signature, 0)
    header = HEADER.pack(*fields)[:-4]
    file.seek(0)
    file.write(header + zlib.crc32(header).to_bytes(4, "little"))


def build_or_load(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    reading: Reading,
    cache_dir: Path,
    *,
    threads: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
    is_verified: bool = False,
) -> TokenCache:
    """The token cache of `files` in `cache_dir`, built unless a valid one is there.

    Its checksum is compared unless another process has just done so (`is_verified`). Memory is
    bounded whatever the size of the text. `should_stop` is polled several times a second. Raises
    Interrupted; UsageError for text that cannot be read, changes meanwhile or is empty, and, naming
    --cache_dir, for a folder that cannot be written.
    """
    wanted = text_signature(files, reading, tokenizer)
    path = cache_dir / _cache_name(files, tokenizer, reading)

    def load() -> TokenCache:
        return TokenCache(path, signature=wanted, verify=not is_verified, should_stop=should_stop)

    def build(because: BadCache) -> TokenCache:
        encoder, file_documents = DocumentEncoder(tokenizer, threads=threads), []
        marks = np.array([[tokenizer.bos_id], [tokenizer.eos_id]], encoder.dtype)
        made_of = bytes(32) if _is_racy(files) else wanted
        try:
            remove_temporaries(cache_dir, r".*\.tokens", older_than=86400)
            with (
                atomic_write(path) as file,
                tempfile.TemporaryFile(dir=cache_dir) as table,
                _byte_bar("tokenizing", sum(_stat(f).st_size for f in files), progress) as bar,
            ):
                blocks = _all_blocks(files, reading, bar.update, file_documents)
                batches = encoder.encode(blocks)
                _write_cache(file, table, batches, file_documents, marks, made_of, should_stop)
                if not any(file_documents):
                    others = " and the others" if len(files) > 1 else ""
                    raise UsageError(f"{files[0]}{others}: empty, there is no text to train on")
                if text_signature(files, reading, tokenizer) != wanted:
                    raise UsageError(f"{files[0]} or another file changed while it was read")
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"--cache_dir {cache_dir}: cannot be written ({reason})") from None
        cache = TokenCache(path, verify=False)
        cache.rebuilt_because = str(because)
        return cache

    try:
        cache = load()
    except BadCache:
        with _sole_builder(path, should_stop) as waited:
            try:
                if not waited:
                    raise
                cache = load()
            except BadCache as bad:
                cache = build(bad)
    cache.token_byte_lengths = tokenizer.token_byte_lengths()
    return cache


@contextlib.contextmanager
def _sole_builder(path: Path, should_stop: Callable[[], bool]) -> Iterator[bool]:
    """Keep other processes, also of other machines, from building the same cache meanwhile.

    Yields whether one of them was at it, and has been waited for. Raises Interrupted.
    """
    waited = False
    with contextlib.ExitStack() as held:
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(hold(path.with_name(f"{path.name}.lock"), remove=True))
                break
            except Busy as holder:
                if not waited:
                    print(f"waiting for {holder}, which makes the same {path}")
                waited = True
            except OSError:  # a folder that cannot be written, of which `build` tells
                break
            time.sleep(0.2)
            if should_stop():
                raise Interrupted
        yield waited


def text_signature(
    files: Sequence[Path], reading: Reading, tokenizer: Tokenizer | None = None
) -> bytes:
    """SHA-256 of all that tells whether what was made of the files is still theirs.

    The time of a file's last change of any kind (ctime) is among it, which no program can set; on
    Windows that is when it was created, and a tool that restores times can hide a change.
    """
    stats = [(path, _stat(path)) for path in files]
    of_files = [[str(p.absolute()), s.st_size, s.st_mtime_ns, s.st_ctime_ns] for p, s in stats]
    vocabulary = hashlib.sha256(tokenizer.model_bytes).hexdigest() if tokenizer else None
    return hashlib.sha256(json.dumps([of_files, vocabulary, asdict(reading)]).encode()).digest()


def _is_racy(files: Sequence[Path]) -> bool:
    """Whether a file changed so shortly before now that a later change may not show."""
    now = time.time_ns()
    # Where there is a time of change that no program sets, the other may be of any year.
    times = [s.st_mtime_ns if os.name == "nt" else s.st_ctime_ns for s in map(_stat, files)]
    return any(at + (FINE_NS if at % 10**9 else COARSE_NS) >= now for at in times)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None


def _all_blocks(
    files: Sequence[Path],
    reading: Reading,
    on_bytes: Callable[[int], object],
    file_documents: list[int],
) -> Iterator[Block]:
    """Blocks of all files in one stream, so that small files share batches; counts documents."""
    for path in files:
        count = 0
        for block in read_documents(path, reading, on_bytes=on_bytes):
            count += block.ends
            yield block
        file_documents.append(count)


def _byte_bar(what: str, total: int, shown: bool) -> tqdm:
    hidden = None if shown and total else True  # None: hidden where there is no terminal
    units = {"unit": "B", "unit_scale": True}
    return progress_bar(total=total, desc=what, leave=False, disable=hidden, **units)


def _cache_name(files: Sequence[Path], tokenizer: Tokenizer, reading: Reading) -> str:
    """Named by the place of the text, not its content: changed text replaces its old cache."""
    return f"{place_name(files, reading, tokenizer.fingerprint)}.tokens"


def place_name(files: Sequence[Path], reading: Reading, *others: str) -> str:
    """The name of what is made of files at this place, read so: the first one's and a hash."""
    where = json.dumps([[str(p.absolute()) for p in files], asdict(reading), *others])
    stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in files[0].stem)[:40]
    return f"{stem}-{hashlib.sha256(where.encode()).hexdigest()[:12]}"
