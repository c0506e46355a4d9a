"""The token ids of a corpus, cached on disk: read in slices, checked, never believed while wrong.

A cache is keyed by all that its ids depend on. Memory is bounded whatever the size of the corpus.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import struct
import tempfile
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minllama.system.encodings import is_utf8
from minllama.system.errors import TextLost, UsageError
from minllama.system.files import READ_BYTES, atomic_write, remove_temporaries
from minllama.system.locks import Busy, hold
from minllama.system.peek import is_csv_name
from minllama.text.documents import Block, read_documents
from minllama.text.encoder import DocumentEncoder, EncodedPart
from minllama.text.reading import Reading, byte_bar
from tokenizer import Tokenizer

# File: header, tokens, zeros to a multiple of 8, (documents, 2) int64 of first token and bytes of
# UTF-8, (files, 2) int64 of tokens and documents, (documents, 2) uint64 of the 16-byte BLAKE2b of
# each document's ids; all little-endian. The header has the SHA-256 of all but these, the key, that
# of these, and ends in a CRC-32 of itself.
MAGIC = b"MLTOKENS"
CACHE_VERSION = 3
HEADER = struct.Struct("<8sIIQQQ32s32s32sI")
ROW = struct.Struct("<QQ16s")  # of a document, while its tokens are written
# Within so many nanoseconds a file may change twice and keep its time stamp: those of most file
# systems advance every few milliseconds, FAT's every two seconds, and they are whole seconds.
FINE_NS, COARSE_NS = 20_000_000, 2_000_000_000
BUFFER_BYTES = 1 << 12  # a chunk is about 1 kB, at a random place


class BadCache(Exception):
    """Why a cache file cannot be used; it is rebuilt."""


# ---------------------------------------------------------------------------- reading


class StoredTokens:
    """The tokens in a cache's file, (count,), read as slices of them are asked for.

    Not memory-mapped: touching a mapped page of a truncated file kills the process. Raises TextLost
    where the file is no longer what was opened.
    """

    def __init__(self, path: Path, file: BinaryIO, dtype: np.dtype, count: int) -> None:
        self.path, self.file, self.dtype, self.count = path, file, dtype, count
        self.stamp = self._stamp()
        self.lock = threading.Lock()  # two threads share the file's position
        weakref.finalize(self, file.close)  # also at the interpreter's end

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.count)
        size = self.dtype.itemsize * max(0, stop - start)
        try:
            with self.lock:
                self.file.seek(HEADER.size + start * self.dtype.itemsize)
                data = self.file.read(size)
            if len(data) == size and self._stamp() == self.stamp:
                return np.frombuffer(data, self.dtype)
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
        check_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = path
        self.rebuilt_because: str | None = None
        if not path.is_file():
            raise BadCache("there was none")
        with contextlib.ExitStack() as opened:
            try:
                file = opened.enter_context(path.open("rb", buffering=BUFFER_BYTES))
                self._open(file, signature, verify, check_stop)
            except OSError as error:
                raise BadCache(f"it cannot be read ({error.strerror})") from None
            opened.pop_all()  # the tokens keep it open

    def _open(
        self, file: BinaryIO, signature: bytes | None, verify: bool, check_stop: Callable[[], None]
    ) -> None:
        data, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
        if len(data) < HEADER.size or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise BadCache("it is damaged (its header is wrong)")
        fields = HEADER.unpack(data)
        magic, version, width, n_tokens, n_documents, n_files, self.key, others, made_of, _ = fields
        if magic != MAGIC or version != CACHE_VERSION or width not in (2, 4):
            raise BadCache("it is not a token cache of this version")
        if signature not in (None, made_of):
            raise BadCache("the text, the vocabulary or the reading options changed")
        tokens_end = HEADER.size + width * n_tokens
        documents_at = tokens_end + -tokens_end % 8
        files_at = documents_at + 16 * n_documents
        fingerprints_at = files_at + 16 * n_files
        if size != fingerprints_at + 16 * n_documents:
            raise BadCache("it is damaged (its size is wrong)")
        self.tokens = StoredTokens(self.path, file, np.dtype(f"<u{width}"), n_tokens)
        edges = (HEADER.size, fingerprints_at, size)
        if verify and _digests(file, edges, check_stop) != [self.key, others]:
            raise BadCache("it is damaged (its checksum is wrong)")
        # Read, not mapped, as the tokens are: 32 bytes for each document.
        documents = _read_pairs(file, documents_at, files_at, "<i8")
        files = _read_pairs(file, files_at, fingerprints_at, "<i8")
        self.document_starts, self.document_bytes = documents[:, 0], documents[:, 1]
        self.file_tokens, self.file_documents = files[:, 0], files[:, 1]
        self.fingerprints = _read_pairs(file, fingerprints_at, size, "<u8")

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


def _read_pairs(file: BinaryIO, start: int, stop: int, dtype: str) -> np.ndarray:
    """A table of a cache, (n, 2). Raises BadCache where the file was cut off meanwhile."""
    file.seek(start)
    data = file.read(stop - start)
    if len(data) < stop - start:
        raise BadCache("it was cut off while it was read")
    return np.frombuffer(data, dtype).reshape(-1, 2)


def _digests(file: BinaryIO, edges: Sequence[int], check_stop: Callable[[], None]) -> list[bytes]:
    """The SHA-256 of what is between one place of a file and the next."""
    digests = []
    with byte_bar("checking", edges[-1]) as bar:
        for start, stop in itertools.pairwise(edges):
            digest = hashlib.sha256()
            file.seek(start)
            while left := stop - file.tell():
                data = file.read(min(READ_BYTES, left))  # mapped pages would count as our memory
                if not data:
                    break  # cut off meanwhile
                digest.update(data)
                bar.update(len(data))
                check_stop()
            digests.append(digest.digest())
    return digests


# ---------------------------------------------------------------------------- building


def build_or_load(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    reading: Reading,
    cache_dir: Path,
    *,
    threads: int | None = None,
    check_stop: Callable[[], None] = lambda: None,
    is_verified: bool = False,
) -> TokenCache:
    """The token cache of `files` in `cache_dir`, built unless a valid one is there.

    Its checksum is compared unless another process has just done so (`is_verified`). What
    `check_stop`, called several times a second, raises leaves no half-made file. Raises UsageError
    for text that cannot be read, changes meanwhile or is empty, and, naming --cache_dir, for a
    folder that cannot be written.
    """
    signature = text_signature(files, reading, tokenizer)
    path = cache_path(files, tokenizer, reading, cache_dir)

    def load() -> TokenCache:
        return TokenCache(path, signature=signature, verify=not is_verified, check_stop=check_stop)

    def build() -> None:
        encoder, file_documents = DocumentEncoder(tokenizer, threads=threads), []
        _outwait_time_stamps(files)
        try:
            remove_temporaries(cache_dir, r".*\.tokens", older_than=86400)
            with (
                atomic_write(path) as file,
                tempfile.TemporaryFile(dir=cache_dir) as table,
                byte_bar("tokenizing", sum(_stat(text).st_size for text in files)) as bar,
            ):
                batches = encoder.encode(_all_blocks(files, reading, bar.update, file_documents))
                _write_cache(file, table, batches, file_documents, encoder, signature, check_stop)
                if not any(file_documents):
                    others = " and the others" if len(files) > 1 else ""
                    raise UsageError(f"{files[0]}{others}: empty, there is no text to train on")
                if text_signature(files, reading, tokenizer) != signature:
                    raise UsageError(f"{files[0]} or another file changed while it was read")
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"--cache_dir {cache_dir}: cannot be written ({reason})") from None

    try:
        cache = load()
    except BadCache:
        with _sole_builder(path, check_stop):
            try:
                cache = load()  # another process may have made it meanwhile
            except BadCache as reason:
                build()
                cache = TokenCache(path, verify=False)
                cache.rebuilt_because = str(reason)
    return cache


def is_cached(
    files: Sequence[Path], tokenizer: Tokenizer, reading: Reading, cache_dir: Path
) -> bool:
    """Whether `build_or_load` would find a cache, by its header; raises UsageError for no file."""
    with contextlib.suppress(BadCache):
        signature = text_signature(files, reading, tokenizer)
        TokenCache(
            cache_path(files, tokenizer, reading, cache_dir), signature=signature, verify=False
        )
        return True
    return False


def cache_path(
    files: Sequence[Path], tokenizer: Tokenizer, reading: Reading, cache_dir: Path
) -> Path:
    """Where the cache is: named by the text's place, so that changed text replaces its old one."""
    return cache_dir / f"{place_name(files, reading, tokenizer.fingerprint)}.tokens"


@contextlib.contextmanager
def _sole_builder(path: Path, check_stop: Callable[[], None]) -> Iterator[None]:
    """Keep other processes, also of other machines, from building the same cache meanwhile.

    One that is at it is waited for.
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
            except OSError:  # a folder that cannot be written: an error of `build`
                break
            time.sleep(0.2)
            check_stop()
        yield


def _write_cache(
    file: BinaryIO,
    table: BinaryIO,
    batches: Iterable[list[EncodedPart]],
    file_documents: list[int],
    encoder: DocumentEncoder,
    signature: bytes,
    check_stop: Callable[[], None],
) -> None:
    """Stream a cache's tokens into a file, then its tables and header.

    `table` is a temporary file for the documents' rows, which follow the tokens: of a corpus with a
    document per line they are gigabytes. `file_documents` grows with the `batches` of the encoder.
    """
    digest, n_tokens = hashlib.sha256(), 0
    start, utf8_bytes, fingerprint = 0, 0, hashlib.blake2b()  # of the document being written

    def write(data: bytes) -> None:
        digest.update(data)
        file.write(data)

    def write_columns(columns: slice) -> None:
        table.seek(0)
        while data := table.read(READ_BYTES):
            write(np.frombuffer(data, "<u8").reshape(-1, 4)[:, columns].tobytes())

    file.write(bytes(HEADER.size))
    for parts in batches:
        arrays = []
        for part in parts:
            if part.starts:
                start, utf8_bytes, fingerprint = n_tokens, 0, hashlib.blake2b(digest_size=16)
            marked = encoder.vocabulary.document(part.ids, starts=part.starts, ends=part.ends)
            arrays += marked
            utf8_bytes += part.utf8_bytes
            fingerprint.update(part.ids.tobytes())
            if part.ends:
                table.write(ROW.pack(start, utf8_bytes, fingerprint.digest()))
            n_tokens += sum(map(len, marked))
        write(np.concatenate(arrays, dtype=encoder.dtype).tobytes())
        check_stop()
    write(bytes(-file.tell() % 8))
    file_starts = []  # in tokens, and the end
    for first in np.cumsum([0, *file_documents]).tolist():
        table.seek(ROW.size * first)
        start_bytes = table.read(8)  # nothing after the last document
        file_starts.append(int.from_bytes(start_bytes, "little") if start_bytes else n_tokens)
    write_columns(slice(2))
    write(np.stack([np.diff(file_starts), file_documents], axis=1).astype("<i8").tobytes())
    key, digest = digest.digest(), hashlib.sha256()
    write_columns(slice(2, 4))
    counts = (encoder.dtype.itemsize, n_tokens, sum(file_documents), len(file_documents))
    header = HEADER.pack(MAGIC, CACHE_VERSION, *counts, key, digest.digest(), signature, 0)[:-4]
    file.seek(0)
    file.write(header + zlib.crc32(header).to_bytes(4, "little"))


def _all_blocks(
    files: Sequence[Path],
    reading: Reading,
    on_bytes: Callable[[int], object],
    file_documents: list[int],
) -> Iterator[Block]:
    """Blocks of all files in one stream, so that small files share batches; counts documents."""
    for path in files:
        file_documents.append(0)
        for block in read_documents(path, reading, on_bytes=on_bytes):
            file_documents[-1] += block.ends
            yield block


# ---------------------------------------------------------------------------- names and signatures


def _fields(reading: Reading) -> dict[str, Any]:
    """How text is read, as earlier versions knew it, whose caches stay in use."""
    fields = asdict(reading)
    del fields["label_field"]  # of no document
    if reading.document_separator is None:
        del fields["document_separator"]
    return fields


def place_name(files: Sequence[Path], reading: Reading, *others: str) -> str:
    """The name of what is made of files at this place, read so: the first one's and a hash."""
    where = json.dumps([[str(p.absolute()) for p in files], _fields(reading), *others])
    stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in files[0].stem)[:40]
    return f"{stem}-{hashlib.sha256(where.encode()).hexdigest()[:12]}"


def text_signature(
    files: Sequence[Path], reading: Reading, tokenizer: Tokenizer | None = None
) -> bytes:
    """SHA-256 of all that changes where what was made of the files is no longer theirs.

    The time of a file's last change of any kind (ctime) is among it, which no program can set; on
    Windows that is when it was created, and a tool that restores times can hide a change.
    """
    stats = [(path, _stat(path)) for path in files]
    states = [[str(p.absolute()), s.st_size, s.st_mtime_ns, s.st_ctime_ns] for p, s in stats]
    # What earlier versions read otherwise, whose caches are not that of today: a CSV as its bytes,
    # and all files in the encoding given.
    otherwise = [str(p.absolute()) for p in files if is_csv_name(p)]
    fields = _fields(reading) | ({"columns": otherwise} if otherwise else {})
    if not is_utf8(reading.encoding):
        fields["encodings"] = "of each file"
    vocabulary = hashlib.sha256(tokenizer.model_bytes).hexdigest() if tokenizer else None
    return hashlib.sha256(json.dumps([states, vocabulary, fields]).encode()).digest()


def _outwait_time_stamps(files: Sequence[Path]) -> None:
    """Return when any change from now on gives each of the files another time stamp."""
    # Where there is a time of change that no program sets, the other may be of any year.
    times = [s.st_mtime_ns if os.name == "nt" else s.st_ctime_ns for s in map(_stat, files)]
    grains = [FINE_NS if at % 10**9 else COARSE_NS for at in times]
    now = time.time_ns()
    is_new = [at + grain >= now for at, grain in zip(times, grains, strict=True)]
    time.sleep(max(itertools.compress(grains, is_new), default=0) / 1e9)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
