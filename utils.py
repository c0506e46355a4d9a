"""What every option needs beside the model: data sets, checkpoint files, the process, its record.

Sections: whole files; from text files to chunks (token cache, holding out, PretrainDataset);
labelled sentences; checkpoints, the run's folder and its lock; seeds, device and signals; several
processes, and the checkpoints they share; telemetry and metrics. What decides an order is a pure
function of (seed, epoch, index), so the state of a run's data is integers. Knows the model only as
a state dict in llama's file format, and nothing of options.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import gzip
import hashlib
import html
import io
import json
import os
import pickle
import platform
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from config import IGNORE_INDEX, RunFailed, UsageError
from llama import FORMAT_VERSION, SealingFile, load_payload, verify_seal
from tokenizer import (
    JSON_SUFFIXES,
    Block,
    DocumentEncoder,
    EncodedPart,
    Reading,
    TextSource,
    Tokenizer,
    atomic_write,
    find_text_files,
    forget_cached,
    read_documents,
    replace,
    split_labelled,
    sync_folder,
)

# ---------------------------------------------------------------------------- whole files


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with Unix line ends, whole or not at all."""
    atomic_write(path, lambda file: file.write(text.encode("utf-8")))


def write_trace(path: Path, profiler: torch.profiler.profile) -> None:
    """Write a profile as compressed Chrome JSON, whole or not at all."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        atomic_write(path, lambda file: file.write(gzip.compress(plain.read_bytes())))


# ---------------------------------------------------------------------------- the token cache

# File: header, tokens, zeros to a multiple of 8, (documents, 2) int64 of first token and bytes of
# UTF-8, (files, 2) int64 of tokens and documents; all little-endian. The header ends in a CRC-32
# of all that follows it and one of itself: any flipped bit, and any burst of 32, is detected.
MAGIC = b"MLTOKENS"
CACHE_VERSION = 1
HEADER = struct.Struct("<8sIIQQQ32sII")
VERIFY_ALWAYS_BYTES = 1 << 30  # a larger cache is verified once, then again only if it was touched
RACY_NS = 2_000_000_000  # a file changed this shortly before we looked may change again unseen
HASH_BYTES = 1 << 20


class BadCache(Exception):
    """Why a cache file cannot be used; it is rebuilt."""


class TokenCache:
    """The tokens of a corpus, memory-mapped: every document between BOS and EOS, in order.

    tokens (n,) uint16 or uint32; document_starts, document_bytes (documents,) int64, the latter of
    UTF-8 text; file_tokens, file_documents (files,) int64. `rebuilt_because` tells why the file was
    made anew, None where it was found as wanted. Raises BadCache when stale, damaged or absent.
    """

    def __init__(self, path: Path, *, key: bytes | None = None, verify: bool = True) -> None:
        self.path = path
        self.rebuilt_because: str | None = None
        self.token_byte_lengths: np.ndarray | None = None  # set by build_or_load
        header, size = _read_header(path)
        magic, version, width, n_tokens, n_documents, n_files, found_key, crc, _ = header
        if magic != MAGIC or version != CACHE_VERSION or width not in (2, 4):
            raise BadCache("it is not a token cache of this version")
        if key is not None and key != found_key:
            raise BadCache("the text, the vocabulary or the reading options changed")
        documents_at = _aligned(HEADER.size + width * n_tokens)
        files_at = documents_at + 16 * n_documents
        if size != files_at + 16 * n_files:
            raise BadCache("it is damaged (its size is wrong)")
        if verify and _payload_crc(path) != crc:
            raise BadCache("it is damaged (its checksum is wrong)")
        raw = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        self.key: bytes = found_key
        self.tokens = raw[HEADER.size : HEADER.size + width * n_tokens].view(f"<u{width}")
        documents = raw[documents_at:files_at].view("<i8").reshape(-1, 2)
        files = raw[files_at:].view("<i8").reshape(-1, 2)
        self.document_starts, self.document_bytes = documents[:, 0], documents[:, 1]
        self.file_tokens, self.file_documents = files[:, 0], files[:, 1]

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

    def chunks_per_file(self, chunk_length: int) -> list[int]:
        """Chunks of each input file's own tokens, in the order of the files."""
        return [count_chunks(int(n), chunk_length) for n in self.file_tokens]


def _read_header(path: Path) -> tuple[tuple, int]:
    try:
        with open(path, "rb") as file:
            data = file.read(HEADER.size)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise BadCache("there was none") from None
    except OSError as error:
        raise BadCache(f"it cannot be read ({error.strerror})") from None
    if len(data) < HEADER.size or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise BadCache("it is damaged (its header is wrong)")
    return HEADER.unpack(data), size


def _payload_crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:  # read, not mapped: mapped pages would count as our memory
        file.seek(HEADER.size)
        while data := file.read(HASH_BYTES):
            crc = zlib.crc32(data, crc)
    return crc


def _aligned(offset: int) -> int:
    return -(-offset // 8) * 8


class _CacheWriter:
    """Streams tokens into a temporary file beside `path`; `publish` makes it the cache, whole.

    The temporary's name is its own, so two processes that build the same cache do not meet.
    """

    def __init__(self, path: Path, dtype: np.dtype, bos_id: int, eos_id: int) -> None:
        self.path, self.dtype = path, dtype.newbyteorder("<")
        self.bos, self.eos = np.array([[bos_id], [eos_id]], self.dtype)
        self.n_tokens = self.n_documents = self.crc = self.open_bytes = 0
        _remove_abandoned(path.parent)
        handle, self.temporary = tempfile.mkstemp(".tmp", f".{path.name}.", path.parent)
        self.file: BinaryIO = open(handle, "wb")
        try:
            # The document table follows the tokens, whose number is not known yet; kept in a file
            # of its own, for a corpus of a document a line has a table of gigabytes.
            self.table = tempfile.TemporaryFile(dir=path.parent)
            self.file.write(bytes(HEADER.size))
        except OSError:
            self.discard()
            raise

    def add(self, parts: Iterable[EncodedPart]) -> None:
        arrays, rows = [], []
        for part in parts:
            if part.starts:
                arrays.append(self.bos)
                rows.append(self.n_tokens)
                self.n_tokens, self.open_bytes = self.n_tokens + 1, 0
            arrays.append(part.ids)
            self.n_tokens += len(part.ids)
            self.open_bytes += part.utf8_bytes
            if part.ends:
                arrays.append(self.eos)
                rows.append(self.open_bytes)
                self.n_tokens, self.n_documents = self.n_tokens + 1, self.n_documents + 1
        self._write(np.concatenate(arrays).astype(self.dtype, copy=False).tobytes())
        self.table.write(np.array(rows, "<i8").tobytes())

    def publish(self, key: bytes, file_documents: Sequence[int]) -> None:
        """Write the rest, flush it to the disk, and move the file to its place."""
        self._write(bytes(_aligned(self.file.tell()) - self.file.tell()))
        files = self._file_table(file_documents).astype("<i8").tobytes()
        self.table.seek(0)
        while data := self.table.read(HASH_BYTES):
            self._write(data)
        self._write(files)
        counts = (self.n_tokens, self.n_documents, len(file_documents))
        fields = (MAGIC, CACHE_VERSION, self.dtype.itemsize, *counts, key, self.crc, 0)
        header = HEADER.pack(*fields)[:-4]
        self.file.seek(0)
        self.file.write(header + zlib.crc32(header).to_bytes(4, "little"))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        replace(Path(self.temporary), self.path)
        sync_folder(self.path.parent)

    def discard(self) -> None:
        """Close, and remove the temporary file unless it was published."""
        for file in (self.file, getattr(self, "table", None)):
            if file is not None:
                with contextlib.suppress(OSError):  # closing flushes: a full disk fails again here
                    file.close()
        Path(self.temporary).unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self.crc = zlib.crc32(data, self.crc)
        self.file.write(data)

    def _file_table(self, file_documents: Sequence[int]) -> np.ndarray:
        starts, first = [], 0
        for count in [*file_documents, 0]:
            start = self.n_tokens
            if first < self.n_documents:
                self.table.seek(16 * first)
                start = int.from_bytes(self.table.read(8), "little")
            starts.append(start)
            first += count
        return np.stack([np.diff(starts), np.asarray(file_documents)], axis=1)


def _remove_abandoned(folder: Path) -> None:
    """Delete temporary files that a killed process left more than a day ago."""
    for path in folder.glob(".*.tokens.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 86400:
                path.unlink()


class _Memo:
    """What is known of files by (path, size, mtime): SHA-256 of inputs, that a cache is sound.

    An entry is not believed when the file had changed within RACY_NS of the look at it, because a
    second change may then have left size and time as they were (git's rule for its index).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.entries: dict[str, list] = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self.entries = {}

    def get(self, path: Path) -> str | None:
        stat = path.stat()
        match self.entries.get(str(path.absolute())):
            case [int(size), int(mtime), int(looked), str(value)]:
                fresh = (size, mtime) == (stat.st_size, stat.st_mtime_ns)
                return value if fresh and mtime + RACY_NS < looked else None
        return None

    def put(self, path: Path, stat: os.stat_result, looked_ns: int, value: str) -> None:
        key = str(path.absolute())
        self.entries[key] = [stat.st_size, stat.st_mtime_ns, looked_ns, value]

    def save(self) -> None:
        """Best effort: without it the next start only takes longer."""
        with contextlib.suppress(OSError):
            write_text(self.path, json.dumps(self.entries))


def build_or_load(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    reading: Reading,
    cache_dir: Path,
    *,
    threads: int | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = True,
) -> TokenCache:
    """The token cache of `files` in `cache_dir`, made or remade where it is not there and sound.

    Memory stays bounded whatever the size of the text. `should_stop` is polled several times a
    second. Raises Interrupted; UsageError for text that cannot be read, changes meanwhile or is
    empty, and, naming --cache_dir, for a folder that cannot be written.
    """
    stop = should_stop or (lambda: False)
    memo = _Memo(cache_dir / "content-hashes.json")
    stats = [(file, _stat(file)) for file in files]
    key = _cache_key(files, tokenizer, reading, memo, stop, progress)
    path = cache_dir / _cache_name(files, tokenizer, reading)
    try:
        cache = _load(path, key, memo)
    except BadCache as error:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            _build(path, key, stats, tokenizer, reading, threads, stop, progress)
        except OSError as os_error:
            reason = os_error.strerror or os_error
            raise UsageError(f"--cache_dir {cache_dir}: cannot be written ({reason})") from None
        cache = TokenCache(path, key=key, verify=False)
        cache.rebuilt_because = str(error)
    cache.token_byte_lengths = tokenizer.token_byte_lengths()
    memo.save()
    return cache


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None


def _load(path: Path, key: bytes, memo: _Memo) -> TokenCache:
    looked = time.time_ns()
    size = path.stat().st_size if path.is_file() else 0
    verify = size <= VERIFY_ALWAYS_BYTES or memo.get(path) != "sound"
    cache = TokenCache(path, key=key, verify=verify)
    if verify and size > VERIFY_ALWAYS_BYTES:
        memo.put(path, path.stat(), looked, "sound")
    return cache


def _build(
    path: Path,
    key: bytes,
    stats: list[tuple[Path, os.stat_result]],
    tokenizer: Tokenizer,
    reading: Reading,
    threads: int | None,
    stop: Callable[[], bool],
    progress: bool,
) -> None:
    files = [file for file, _ in stats]
    encoder = DocumentEncoder(tokenizer, threads=threads)
    file_documents: list[int] = []
    writer = _CacheWriter(path, encoder.dtype, tokenizer.bos_id, tokenizer.eos_id)
    try:
        with _byte_bar("tokenizing", files, progress) as bar:
            for batch in encoder.encode(_all_blocks(files, reading, bar.update, file_documents)):
                writer.add(batch)
                if stop():
                    raise Interrupted
        if not writer.n_documents:
            named = ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
            raise UsageError(f"{named}: empty, there is no text to train on")
        _check_unchanged(stats)  # since they were hashed
        writer.publish(key, file_documents)
    finally:
        writer.discard()


def _check_unchanged(stats: list[tuple[Path, os.stat_result]]) -> None:
    for path, before in stats:
        now = _stat(path)
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise UsageError(f"{path}: changed while it was read; wait until it is whole")


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


def _byte_bar(what: str, files: Sequence[Path], progress: bool) -> tqdm:
    total = sum(_stat(path).st_size for path in files)
    hidden = None if progress and total else True  # None: hidden where there is no terminal
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False, disable=hidden)


def _cache_key(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    reading: Reading,
    memo: _Memo,
    stop: Callable[[], bool],
    progress: bool,
) -> bytes:
    """SHA-256 of all that the tokens depend on; names count only by the format they tell."""
    key = hashlib.sha256(b"%d" % CACHE_VERSION)
    key.update(hashlib.sha256(tokenizer.model_bytes).digest())
    key.update(json.dumps(asdict(reading), sort_keys=True).encode())
    unknown = [path for path in files if memo.get(path) is None]
    with _byte_bar("checking", unknown, progress) as bar:
        for path in unknown:
            looked, stat = time.time_ns(), _stat(path)
            memo.put(path, stat, looked, _hash_file(path, stop, bar.update))
    for path in files:
        is_json = path.name.lower().endswith(JSON_SUFFIXES)
        key.update(f"{memo.entries[str(path.absolute())][3]} {is_json}\n".encode())
    return key.digest()


def _hash_file(path: Path, stop: Callable[[], bool], on_bytes: Callable[[int], object]) -> str:
    digest = hashlib.sha256()
    try:
        if not path.is_file():
            raise UsageError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            while data := file.read(HASH_BYTES):
                digest.update(data)
                on_bytes(len(data))
                if stop():
                    raise Interrupted
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _cache_name(files: Sequence[Path], tokenizer: Tokenizer, reading: Reading) -> str:
    """Named by where the text is, not by what it says: changed text replaces its old cache."""
    where = json.dumps([[str(p.absolute()) for p in files], asdict(reading), tokenizer.fingerprint])
    stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in files[0].stem)[:40]
    return f"{stem}-{hashlib.sha256(where.encode()).hexdigest()[:12]}.tokens"


# ---------------------------------------------------------------------------- holding out


class TokenStream:
    """Stretches of a token array read as one: token `i` of the stream, without a copy of it all."""

    def __init__(
        self,
        tokens: np.ndarray,
        starts: np.ndarray,
        stops: np.ndarray,
        *,
        utf8_bytes: int | None = None,
    ) -> None:
        self.tokens, self.starts = tokens, np.asarray(starts, np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(np.asarray(stops, np.int64) - self.starts)])
        self.utf8_bytes = utf8_bytes  # of the text, for bits per byte; None: not known

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 of the stream, (stop - start,)."""
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        found = []
        while start < stop:
            at = int(self.starts[first]) + start - int(self.offsets[first])
            count = min(stop, int(self.offsets[first + 1])) - start
            found.append(self.tokens[at : at + count])
            start, first = start + count, first + 1
        return found[0] if len(found) == 1 else np.concatenate([self.tokens[:0], *found])

    def locate(self, position: int) -> int:
        """Where token `position` of the stream stands in the token array."""
        index = int(np.searchsorted(self.offsets, position, side="right")) - 1
        return int(self.starts[index]) + position - int(self.offsets[index])


def whole_stream(cache: TokenCache) -> TokenStream:
    """All of a cache, as validation files are read."""
    return _documents_stream(cache, np.ones(len(cache.document_starts), bool))


def split_documents(
    cache: TokenCache, val_fraction: float, seed: int = 0, *, chunk_length: int
) -> tuple[TokenStream, TokenStream | None]:
    """(train, val): whole documents are held out, chosen by a pure function of their number.

    Held-out tokens stay at or below `val_fraction` of all where documents are small enough; of a
    single document its last chunks are held out, at least one. val is None for a fraction of 0 and
    for a corpus too small to part with anything.
    """
    if val_fraction <= 0:
        return whole_stream(cache), None
    if len(cache.document_starts) == 1:
        return _split_last_chunks(cache, val_fraction, chunk_length)
    held_out = _choose_documents(cache, val_fraction, seed)
    return _documents_stream(cache, ~held_out), _documents_stream(cache, held_out)


def _choose_documents(cache: TokenCache, val_fraction: float, seed: int) -> np.ndarray:
    """(documents,) bool: random documents that fit the fraction; the smallest where none does."""
    sizes = cache.document_stops() - cache.document_starts
    target = min(val_fraction, 0.5) * len(cache)
    order = np.argsort(_scrambled(len(sizes), seed), kind="stable")
    order = order[sizes[order] <= target]  # one huge document must not be the whole hold-out
    if not len(order):
        order = np.argmin(sizes, keepdims=True)
        target = sizes[order[0]]
    held_out = np.zeros(len(sizes), bool)
    held_out[order[: np.searchsorted(np.cumsum(sizes[order]), target, side="right")]] = True
    return held_out


def _scrambled(count: int, seed: int) -> np.ndarray:
    """(count,) uint64: splitmix64 of 0..count-1, so a document's number decides alone."""
    x = np.arange(count, dtype=np.uint64) + np.uint64(seed % (1 << 32) << 32 | 0x6D696E69)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _documents_stream(cache: TokenCache, chosen: np.ndarray) -> TokenStream:
    """The chosen documents; neighbours make one stretch."""
    edges = np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8))
    first, last = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1
    starts, stops = cache.document_starts[first], cache.document_stops()[last]
    return TokenStream(
        cache.tokens, starts, stops, utf8_bytes=int(cache.document_bytes[chosen].sum())
    )


def _split_last_chunks(
    cache: TokenCache, val_fraction: float, chunk_length: int
) -> tuple[TokenStream, TokenStream | None]:
    size = len(cache)
    chunks = -(-size // chunk_length)
    held_out = min(chunks - 1, max(1, round(chunks * val_fraction)))
    cut = (chunks - held_out) * chunk_length
    if held_out < 1 or size - cut < 2:  # no chunk to spare, or a single token: nothing to predict
        return whole_stream(cache), None
    val_bytes = None
    if cache.token_byte_lengths is not None:
        tail = cache.tokens[cut:]
        val_bytes = sum(
            int(cache.token_byte_lengths[tail[at : at + HASH_BYTES]].sum())
            for at in range(0, len(tail), HASH_BYTES)
        )
    return (
        TokenStream(cache.tokens, np.array([0]), np.array([cut])),
        TokenStream(cache.tokens, np.array([cut]), np.array([size]), utf8_bytes=val_bytes),
    )


# ---------------------------------------------------------------------------- pretraining chunks


def count_chunks(n_tokens: int, chunk_length: int) -> int:
    """Chunks of a stream: every token but the last is an input, so ceil((n - 1) / chunk_length)."""
    return -(-max(0, n_tokens - 1) // chunk_length)


class PretrainDataset:
    """A token stream cut into chunks of `chunk_length` inputs; the last one may be short.

    Chunk i predicts tokens i*T+1 .. (i+1)*T from tokens i*T .. (i+1)*T-1. The length cuts the
    stream and never truncates the text: the old bug was to tokenize a file with max_len=1024, which
    made "1 chunk" of any file. Raises UsageError for fewer than two tokens.
    """

    def __init__(self, stream: TokenStream, chunk_length: int) -> None:
        if chunk_length < 1:
            raise UsageError(f"--max_seq_len {chunk_length}: must be at least 1")
        if len(stream) < 2:
            raise UsageError(
                f"the training text is {len(stream)} token: at least two are needed, one to read "
                "and one to predict"
            )
        self.stream, self.chunk_length = stream, chunk_length

    @classmethod
    def from_files(
        cls,
        patterns: Sequence[str | Path],
        tokenizer: Tokenizer,
        chunk_length: int,
        *,
        cache_dir: Path,
        reading: Reading | None = None,
        progress: bool = False,
    ) -> PretrainDataset:
        """The chunks of text files, for those who import this class directly."""
        files = find_text_files(patterns)
        cache = build_or_load(files, tokenizer, reading or Reading(), cache_dir, progress=progress)
        return cls(whole_stream(cache), chunk_length)

    def __len__(self) -> int:
        return count_chunks(len(self.stream), self.chunk_length)

    @property
    def n_targets(self) -> int:
        """Tokens that one epoch predicts."""
        return len(self.stream) - 1

    def chunk(self, index: int) -> np.ndarray:
        """Inputs and the target after the last, (up to chunk_length + 1,)."""
        if not 0 <= index < len(self):
            raise IndexError(f"chunk {index} of {len(self)}")
        start = index * self.chunk_length
        return self.stream.read(start, min(start + self.chunk_length + 1, len(self.stream)))

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, targets), both (B, T) int64, T the longest chunk's; IGNORE_INDEX pads targets.

        Tokens are padded with 0; causal attention lets no real position see them.
        """
        chunks = [self.chunk(int(index)) for index in indices]
        longest = max(len(chunk) for chunk in chunks) - 1
        tokens = np.zeros((len(chunks), longest), np.int64)
        targets = np.full((len(chunks), longest), IGNORE_INDEX, np.int64)
        for row, chunk in enumerate(chunks):
            tokens[row, : len(chunk) - 1] = chunk[:-1]
            targets[row, : len(chunk) - 1] = chunk[1:]
        return torch.from_numpy(tokens), torch.from_numpy(targets)


@functools.lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0..n-1, (n,) int64, read-only; the same for ever for the same numbers.

    It sorts the raw output of PCG64, a stream that NumPy promises to keep (NEP 19); it promises no
    such thing for `Generator.permutation`, and a run may be resumed after an upgrade.
    """
    raw = np.random.PCG64([seed, epoch]).random_raw(n)
    order = np.argsort(raw, kind="stable")
    order.flags.writeable = False
    return order


def count_batches(n: int, batch_size: int) -> int:
    """Batches of an epoch, the short last one included."""
    return -(-n // batch_size)


def batch_indices(n: int, batch_size: int, seed: int, epoch: int, index: int) -> np.ndarray:
    """Chunk numbers of batch `index` of an epoch, (up to batch_size,) int64; the last is short."""
    if not 0 <= index < count_batches(n, batch_size):
        raise IndexError(f"batch {index} of {count_batches(n, batch_size)}")
    return epoch_order(n, seed, epoch)[index * batch_size : (index + 1) * batch_size]


# ---------------------------------------------------------------------------- labelled sentences

UNLABELLED = -1  # the label of a sentence without one, in files and in batches
BUCKET_BATCHES = 50  # training batches are sorted by length within windows of this many


@dataclass(frozen=True)
class LabelledExample:
    """A sentence as written, and its label; None where the file has none."""

    label: int | None
    sentence: str


class LabelledBatch(NamedTuple):
    """Sentences as tensors, padded on the right with 0: `lengths` says what is real."""

    tokens: torch.Tensor  # (B, T) int64
    lengths: torch.Tensor  # (B,) int64
    labels: torch.Tensor  # (B,) int64, UNLABELLED where there is none
    indices: torch.Tensor  # (B,) int64, places in the file


def read_labelled(path: Path, *, n_labels: int | None = None) -> list[LabelledExample]:
    """The lines `label ||| sentence` of a file, in order; blank lines are left out.

    A label of -1, or none, means unlabelled. Raises UsageError `file:line: ...` for anything else
    that is not a whole number from 0 (below `n_labels`, if given), and for an empty file.
    """
    examples = [
        LabelledExample(_parse_label(label, f"{path}:{number}", n_labels), sentence)
        for number, line in TextSource(path).lines()
        if line.strip()
        for label, sentence in [split_labelled(path, number, line)]
    ]
    if not examples:
        raise UsageError(f"{path}: empty, there is no line `label ||| sentence`")
    return examples


def _parse_label(text: str, where: str, n_labels: int | None) -> int | None:
    if text in ("", str(UNLABELLED)):
        return None
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise UsageError(f"{where}: label {text!r} is not a whole number")
    label = int(text)
    if label < 0 or (n_labels is not None and label >= n_labels):
        last = "" if n_labels is None else f" to {n_labels - 1}"
        raise UsageError(
            f"{where}: label {label} is not one of 0{last} (-1 for unlabelled); do the label names "
            "belong to this file?"
        )
    return label


class LlamaDataset:
    """A labelled file, encoded: `ids[i]` are BOS and the tokens of `examples[i]`'s sentence, of
    which at most `max_sentence_len` are kept; `cut` is how many sentences had more."""

    def __init__(
        self,
        path: Path,
        tokenizer: Tokenizer,
        *,
        n_labels: int | None = None,
        max_sentence_len: int | None = None,
    ) -> None:
        self.path = path
        self.examples = read_labelled(path, n_labels=n_labels)
        sentences = tokenizer.sp_model.encode([example.sentence for example in self.examples])
        self.ids = [[tokenizer.bos_id, *ids[:max_sentence_len]] for ids in sentences]
        self.cut = sum(len(ids) > (max_sentence_len or len(ids)) for ids in sentences)
        self.lengths = np.array([len(ids) for ids in self.ids], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def labels(self) -> list[int | None]:
        """The label of each example."""
        return [example.label for example in self.examples]

    def is_unlabelled(self) -> bool:
        """Whether no sentence has a label."""
        return all(label is None for label in self.labels)

    def has_placeholder_labels(self) -> bool:
        """Whether a test file's labels tell nothing: none, or one and the same on every line.

        CFIMDB's test file has 0 on all lines; an accuracy against it means nothing.
        """
        return self.is_unlabelled() or (len(self) > 1 and len(set(self.labels)) == 1)

    def length_sorted_batches(self, batch_size: int) -> list[np.ndarray]:
        """Every index once, longest sentences first, so that little is padded; for prediction."""
        order = np.argsort(-self.lengths, kind="stable")
        return np.split(order, range(batch_size, len(order), batch_size))

    def collate(self, indices: Sequence[int] | np.ndarray) -> LabelledBatch:
        """The examples at `indices` as one batch, padded to its longest."""
        lengths = torch.from_numpy(self.lengths[np.asarray(indices)])
        tokens = torch.zeros(len(indices), int(lengths.max()), dtype=torch.int64)
        for row, index in enumerate(indices):
            tokens[row, : len(self.ids[index])] = torch.tensor(self.ids[index])
        labels = [self.examples[index].label for index in indices]
        labels = [UNLABELLED if label is None else label for label in labels]
        return LabelledBatch(
            tokens, lengths, torch.tensor(labels), torch.tensor([int(i) for i in indices])
        )


def bucketed_batches(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """Batches of an epoch, alike in length: a pure function of (lengths, batch_size, seed, epoch).

    Indices are shuffled, sorted by length within windows of BUCKET_BATCHES batches, cut into
    batches, and the batches shuffled. Each index comes once; one batch may be short.
    """
    order = epoch_order(len(lengths), seed, epoch)
    window = BUCKET_BATCHES * batch_size
    batches = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += np.split(part, range(batch_size, len(part), batch_size))
    # Another stream than the indices' own: the epoch's number alone would give the same one twice.
    return [batches[i] for i in epoch_order(len(batches), seed + (1 << 32), epoch)]


# ---------------------------------------------------------------------------- checkpoints


def write_sealed(file: BinaryIO, payload: dict[str, Any]) -> None:
    """Write tensors and plain values, and behind them the SHA-256 of every byte."""
    sealing = SealingFile(file)
    torch.save(payload | {"format_version": FORMAT_VERSION}, sealing)
    sealing.seal()


def save_checkpoint(path: Path, payload: dict[str, Any]) -> None:
    """Write tensors and plain values with their SHA-256, whole and read back, or not at all.

    Raises OSError, and then `path` is as it was.
    """

    def verify(temporary: Path) -> None:
        try:
            whole = verify_seal(temporary)
        except UsageError:
            whole = False
        if not whole:
            raise OSError(errno.EIO, "what was read back is not what was written", str(path))

    try:
        atomic_write(path, lambda file: write_sealed(file, payload), verify=verify)
    except RuntimeError as error:  # torch's writer hides what the file raised
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def load_checkpoint(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """Read a file of `save_checkpoint` into memory and verify it; runs no code from it.

    Of a sharded checkpoint it reads the plain values, verifies the tensors' files, and tells
    `load_sharded` by 'restore_from' where they are. Raises UsageError naming the file when it is
    not whole, not ours, or not what was written.
    """
    if path.is_dir():
        payload = load_checkpoint(path / STATE_FILE, verify=verify)
        if verify:
            verify_shards(path, payload)
            check_metadata(path / ".metadata")
        return payload | {"restore_from": path}
    if not path.is_file():
        raise UsageError(f"--resume {path}: no such file")
    with path.open("rb") as file:
        if file.read(2) != b"PK":  # torch writes zip archives
            raise UsageError(f"{path} is no checkpoint: name a -epoch-N.pt or -step-N.pt file")
    # Mapped: its claims of size are checked by then.
    payload = copy.deepcopy(load_payload(path, verify=verify))
    payload.pop("digest", None)
    return payload


RESUMABLE = {"model", "optimizer", "scaler", "rng", "progress", "identity"}


STATE_FILE = "state.pt"  # of a sharded checkpoint: its plain values, in a folder with its tensors


def state_file(path: Path) -> Path:
    """The file of a checkpoint that holds its plain values: itself, or one in its folder."""
    return path / STATE_FILE if path.is_dir() else path


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))


def remove(path: Path) -> None:
    """Delete a file, or a folder such that no half of it is left under its name."""
    if path.is_dir():
        aside = path.with_name(f".{path.name}.removed.tmp")
        os.replace(path, aside)
        shutil.rmtree(aside)
    else:
        path.unlink()


def check_resumable(path: Path, payload: dict[str, Any]) -> None:
    """Raise UsageError where a sound file is no state of a run."""
    missing = sorted(RESUMABLE - payload.keys())
    if missing or not all(isinstance(payload[name], dict) for name in RESUMABLE):
        raise UsageError(
            f"{path} is a weights file and holds no state to go on from "
            f"({', '.join(missing) or 'other types'}): name a -epoch-N.pt or -step-N.pt file"
        )


def random_state() -> dict[str, Any]:
    """The state of every random number generator, as tensors and plain values."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` took; CUDA's only where the number of GPUs is the same."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


# ---------------------------------------------------------------------------- the run's folder


CHECKPOINT_NAME = r"-(epoch|step)-\d+(\.pt|-sharded)"  # after the run's prefix
RUN_FILES = (
    "final-model.pt",
    "best-model.pt",
    "metrics.jsonl",
    "run.json",
    "loss-curve.svg",
    "profile.json.gz",
)


@dataclass
class RunFolder:
    """The files of one run: checkpoints `<prefix>-epoch-N.pt`, its models and its records.

    `prefix` names the option (`pretrain`) or the option and the data set (`finetune-sst`), so runs
    of several options share a folder without touching each other's files.
    """

    path: Path
    prefix: str

    @property
    def records_prefix(self) -> str:
        """What stands before the records' names: nothing for the main job."""
        return "" if self.prefix == "pretrain" else f"{self.prefix}-"

    def file(self, name: str) -> Path:
        """One of the run's files by its plain name, e.g. final-model.pt or metrics.jsonl."""
        return self.path / f"{self.records_prefix}{name}"

    def own_files(self) -> list[Path]:
        """The files that runs of this prefix write and that stand here now."""
        files = [self.file(name) for name in RUN_FILES if self.file(name).is_file()]
        return files + self.checkpoints()

    def checkpoints(self) -> list[Path]:
        """What bears the name of a resumable checkpoint, whoever wrote it."""
        pattern = re.compile(re.escape(self.prefix) + CHECKPOINT_NAME)
        return sorted(path for path in self.path.glob("*-*-*") if pattern.fullmatch(path.name))

    def epoch_checkpoint(self, epoch: int) -> Path:
        """The resumable checkpoint after `epoch` passes over the data."""
        return self.path / f"{self.prefix}-epoch-{epoch}.pt"

    def step_checkpoint(self, step: int) -> Path:
        """The resumable checkpoint after `step` optimizer steps."""
        return self.path / f"{self.prefix}-step-{step}.pt"

    def prune(self, keep_last: int, *, run_id: str, step: int) -> None:
        """Delete all but the newest `keep_last` step checkpoints up to `step` (0: keep all).

        Only those that the run `run_id` wrote are counted and deleted. Best effort: what cannot be
        deleted stays.
        """
        own = []
        for path in self.checkpoints() if keep_last else []:
            with contextlib.suppress(UsageError, OSError):  # damaged: not known to be ours
                found = peek(path)
                if "-step-" in path.name and found.run_id == run_id and found.step <= step:
                    own.append((found.step, path))
        for _, path in sorted(own, reverse=True)[keep_last:]:
            with contextlib.suppress(OSError):
                remove(path)

    def remove_abandoned(self) -> None:
        """Delete the temporary files of runs of this prefix that were killed while they wrote."""
        names = [re.escape(self.file(name).name) for name in RUN_FILES]
        names.append(re.escape(self.prefix) + CHECKPOINT_NAME)
        pattern = re.compile(rf"\.({'|'.join(names)})\.(\d+|removed|written)\.tmp")
        for path in self.path.glob(".*.tmp"):
            if pattern.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    @contextlib.contextmanager
    def locked(self, ranks: Ranks | None = None) -> Iterator[None]:
        """Keep other runs of this prefix out of the folder within the block.

        Rank 0 holds the lock. Raises UsageError that names the run that is in the folder, and
        where the other ranks do not see it: they are on machines that do not share it.
        """
        path, ranks = self.file("run.lock"), ranks or Ranks()
        ranks.on_main(lambda: take_lock(path, ranks))
        try:
            ranks.on_all(lambda: self._check_shared(path, ranks))
            yield
        finally:
            with contextlib.suppress(OSError):
                if ranks.is_main:
                    path.unlink()

    def _check_shared(self, path: Path, ranks: Ranks) -> None:
        if ranks.nodes == 1:
            return
        wanted = ranks.on_main(lambda: path.read_text(encoding="utf-8"))
        for _ in range(100):  # a network file system shows a new file late
            if _read_lock(path) == wanted:
                return
            time.sleep(0.1)
        raise UsageError(
            f"--save_dir {self.path}: machine {ranks.node} ({platform.node()}) does not see what "
            "rank 0 wrote there: name a folder that all machines share"
        )

    def check_free(self, *, resume: bool, overwrite: bool) -> None:
        """Raise UsageError if a run stands here that is neither to be resumed nor removed."""
        present = self.own_files()
        if present and not resume and not overwrite:
            raise UsageError(
                f"--save_dir {self.path} already holds a run ({present[0].name}): add --resume "
                "auto to go on with it, --overwrite to remove its files, or name another folder"
            )

    def clear(self) -> None:
        """Remove the files of an earlier run, and no others."""
        for path in self.own_files():
            remove(path)

    def add_start(self, record: dict[str, Any]) -> None:
        """Put one start of the run, the first or a resume, into run.json."""
        starts = [*self.starts(), record]
        write_text(self.file("run.json"), json.dumps({"starts": starts}, indent=2) + "\n")

    def starts(self) -> list[dict[str, Any]]:
        """The starts in run.json; none where it is not there or was cut by a crash."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return json.loads(self.file("run.json").read_text(encoding="utf-8"))["starts"]
        return []

    def find_checkpoint(self, resume: str) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint that `--resume` names, read and verified.

        auto: the newest by its training step that is whole; what is skipped is said. None where a
        run was begun here and ended before its first. Raises UsageError if there is none.
        """
        if resume != "auto":
            payload = load_checkpoint(Path(resume))
            check_resumable(Path(resume), payload)
            return Path(resume), payload
        paths = self.checkpoints()
        if not paths and self.file("run.json").is_file():
            return None
        for path in self.newest_first(paths):
            try:
                payload = load_checkpoint(path)
                check_resumable(path, payload)
                return path, payload
            except UsageError as error:
                print(f"skipped: {error}")
        raise UsageError(
            f"--resume auto: no whole {self.prefix} checkpoint in {self.path}; start without it"
            + (", with --overwrite" if paths else "")
        )

    def last_good(self, run_id: str, step: int) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint of a run before `step` that followed no skipped update."""
        for path in self.newest_first(self.checkpoints(), quiet=True):
            with contextlib.suppress(UsageError):
                found = peek(path)
                if found.run_id == run_id and found.step < step and not found.skipped:
                    return path, load_checkpoint(path)
        return None

    def newest_first(self, paths: Sequence[Path], *, quiet: bool = False) -> list[Path]:
        """Checkpoints by training step; those that do not even tell theirs are left out."""
        steps = []
        for path in paths:
            try:
                steps.append((peek(path).step, path))
            except UsageError as error:
                if not quiet:
                    print(f"skipped: {error}")
        return [path for _, path in sorted(steps, reverse=True)]


class Peek(NamedTuple):
    """What a checkpoint says of itself, unverified."""

    run_id: str | None
    step: int
    skipped: int


def peek(path: Path) -> Peek:
    """Read a checkpoint's plain values and none of its tensors. Raises UsageError."""
    payload = load_payload(state_file(path), verify=False)
    check_resumable(path, payload)
    progress = payload["progress"]
    step, skipped = progress.get("step"), progress.get("skipped", 0)
    if not isinstance(step, int) or not isinstance(skipped, int):
        raise UsageError(f"{path} is damaged: its step is {step!r}")
    return Peek(payload.get("run_id"), step, skipped)


# ---------------------------------------------------------------------------- the folder's lock


def take_lock(path: Path, ranks: Ranks) -> None:
    """Make a lock file of this process; one that a dead process left is taken over.

    So is one of the same launch on another machine: a launcher restarts when all have ended.
    Raises UsageError that names the process that holds it.
    """
    mine = json.dumps(process_name(os.getpid()) | {"launch": ranks.launch})
    for _ in range(2):
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(mine)
            return
        except FileExistsError:
            found = _read_lock(path)
        except OSError as error:
            raise UsageError(f"{path}: cannot be written ({error.strerror})") from None
        if found is not None and _is_held(path, found, ranks):
            _raise_held(path, found)
        _remove_stale(path, found)
    raise UsageError(f"{path}: another run has just begun in this folder; name another one")


def process_name(pid: int) -> dict[str, Any]:
    """What tells a process from every other: its number, its machine, and when it began."""
    return {"pid": pid, "host": platform.node(), "began": process_began(pid)}


def process_began(pid: int) -> int | None:
    """When a living process began, in the system's ticks since it started; None: not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] == "Z" else int(fields[19])  # a zombie has ended


def process_lives(pid: int) -> bool:
    """Whether a process of this number runs on this machine."""
    if sys.platform == "win32":
        import ctypes

        handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, pid)  # to query, no more
        code = ctypes.c_ulong()
        ctypes.windll.kernel32.GetExitCodeProcess(handle, ctypes.byref(code))
        ctypes.windll.kernel32.CloseHandle(handle)
        return bool(handle) and code.value == 259  # STILL_ACTIVE
    if Path("/proc/self/stat").exists():
        return process_began(pid) is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _read_lock(path: Path) -> str | None:
    """The content of a lock file, None where it has just gone."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8")
    return None


def _holder(content: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        holder = json.loads(content)
        if isinstance(holder, dict) and isinstance(holder.get("pid"), int):
            return holder
    return {}


def _is_held(path: Path, content: str, ranks: Ranks) -> bool:
    holder = _holder(content)
    if not holder:  # made this moment and not yet written, or cut off by a crash
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime < 10
        return False
    if holder.get("host") != platform.node():  # nothing can be known of it from here
        return not ranks.is_launch_of(holder)
    began = process_began(holder["pid"])
    if holder.get("began") is not None and began is not None and began != holder["began"]:
        return False  # its number was given to another process
    return process_lives(holder["pid"])


def _raise_held(path: Path, content: str) -> NoReturn:
    holder = _holder(content)
    who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown machine')}"
    remedy = "wait for it or name another folder"
    if holder.get("host") != platform.node():
        remedy += f"; if it has ended, remove {path}"
    raise UsageError(f"--save_dir {path.parent}: {who} is running in it: {remedy}")


def _remove_stale(path: Path, content: str | None) -> None:
    """Move a stale lock aside and look again: another process may have taken it over just now."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        os.replace(path, aside)
        if content is not None and aside.read_text(encoding="utf-8") != content:
            os.replace(aside, path)
        aside.unlink(missing_ok=True)
    except OSError:
        pass  # gone already: the next attempt tells who has it


def check_writable(folder: Path, flag: str) -> None:
    """Make `folder` and write a byte into it; raises UsageError that names the flag."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.write_bytes(b"\0")
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{flag} {folder}: cannot write there ({error.strerror})") from None


def check_writable_file(path: Path, flag: str) -> None:
    """Raise UsageError, naming the flag, where a file cannot be written at the end of a run."""
    if path.is_dir():
        raise UsageError(f"{flag} {path}: is a folder; name a file")
    check_writable(path.parent, flag)
    if path.exists() and not os.access(path, os.W_OK):
        raise UsageError(f"{flag} {path}: is write-protected; name another file")


# ---------------------------------------------------------------------------- the process


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def choose_device(use_gpu: bool, ranks: Ranks | None = None) -> tuple[torch.device, str]:
    """The device to compute on, and a line that says so; a missing GPU is no error.

    Of several processes each takes a GPU of its own; raises UsageError where there are too few.
    """
    gpu, several = None, ranks is not None and ranks.world_size > 1
    if torch.cuda.is_available():
        gpu = torch.device("cuda")
        if several and use_gpu:
            if ranks.local_rank >= torch.cuda.device_count():
                raise UsageError(
                    f"--use_gpu: process {ranks.local_rank + 1} of this machine has no GPU of its "
                    f"own: start at most --nproc_per_node {torch.cuda.device_count()}"
                )
            gpu = torch.device("cuda", ranks.local_rank)
            torch.cuda.set_device(gpu)
    elif torch.backends.mps.is_available() and not several:  # it cannot talk to other processes
        gpu = torch.device("mps")
    if gpu is not None and use_gpu:
        name = torch.cuda.get_device_name() if gpu.type == "cuda" else "Apple GPU (MPS)"
        return gpu, name
    note = f"CPU, {torch.get_num_threads()} threads"
    if use_gpu:
        note += "; --use_gpu: no GPU that torch can use was found, so this goes on on the CPU"
    elif gpu is not None:
        note += "; this machine has a GPU: --use_gpu uses it"
    return torch.device("cpu"), note


def describe_device(device: torch.device) -> str:
    """The device's name, for records."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.processor() or platform.machine()}"


def free_disk(folder: Path) -> int:
    """Bytes free on the disk of `folder`, or of the nearest folder above it that exists."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the arithmetic; `auto` takes bfloat16 where the device multiplies it fast."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile does not work here, found by compiling next to nothing; None: it does."""
    try:
        torch.compile(lambda x: 2 * x + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # no compiler, one that fails, no Python headers, no Triton, ...
        return str(error).strip().split("\n")[0]
    return None


def check_compiler(device: torch.device) -> None:
    """Raise UsageError where torch.compile does not work."""
    problem = compiler_problem(device)
    if problem is not None:
        raise UsageError(
            f"--compile: torch cannot compile here ({problem}): install a C++ compiler (g++, "
            "clang++ or Windows' cl) with Python's headers, or give --compile off"
        )


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for those of the next step.

    By default it returns large blocks to the system, which zeroes their pages anew at each step: a
    seventh of a step's time. The peak stays as it is. Other systems' allocators are left alone.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        import ctypes

        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)  # no block gets pages of its own, however large
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # and the heap never shrinks


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` as the flags spell it: bfloat16."""
    return str(dtype).removeprefix("torch.")


def available_memory(device: torch.device) -> int | None:
    """Bytes free on the device (the CPU: in the machine), or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        if sys.platform == "linux":
            text = Path("/proc/meminfo").read_text(encoding="utf-8")
            return int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) * 1024
        if sys.platform == "darwin":
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return windows_available_memory()
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def windows_available_memory() -> int:
    """Bytes of free physical memory, from GlobalMemoryStatusEx."""
    import ctypes

    status = (ctypes.c_uint64 * 8)()  # MEMORYSTATUSEX: length and load, then seven sizes
    status[0] = ctypes.sizeof(status)
    ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
    return status[2]


def used_memory(device: torch.device) -> int | None:
    """Peak bytes of this process on the device (the CPU: resident), or None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform in ("linux", "darwin"):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1024 if sys.platform == "linux" else 1)
    return None


class Interrupted(Exception):
    """The user asked to stop while nothing had to be saved; nothing half-made is left."""


@dataclass
class StopRequest:
    """Whether the user asked to stop (Ctrl-C, SIGTERM). The handler only sets it; loops read it.

    A second signal finds Python's own handler restored and ends the process at once. Under a
    launcher the same one may come twice, so there `repeats` seconds pass first.
    """

    signal_number: int | None = None
    previous: dict[int, Any] = field(default_factory=dict)
    repeats: float = 0.0
    silent: bool = False

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal_number is not None

    @property
    def exit_status(self) -> int:
        """What a shell expects of a process ended by that signal: 130 for Ctrl-C, 143 for TERM."""
        return 128 + (self.signal_number or 0)

    def check(self) -> None:
        """Raise Interrupted if a signal has come: for work that has nothing to save."""
        if self.requested:
            raise Interrupted

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle SIGINT and SIGTERM within the block."""

        since = 0.0

        def handle(signal_number: int, frame: Any) -> None:
            nonlocal since
            if since and time.monotonic() - since < self.repeats:
                return
            if since or not self.repeats:
                self.restore()
            if since:
                signal.raise_signal(signal_number)
            self.signal_number, since = signal_number, time.monotonic()
            if not self.silent:
                # os.write, since print may be interrupted in the middle of its own lock
                os.write(2, b"\nstopping after this step; once more to quit at once\n")

        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, handle)
        try:
            yield self
        finally:
            self.restore()

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        while self.previous:
            number, handler = self.previous.popitem()
            signal.signal(number, handler)


# ---------------------------------------------------------------------------- several processes

T = TypeVar("T")
REPEATS = 5.0  # seconds in which a launcher and the system may both deliver one and the same signal


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run, as torchrun tells it in the environment.

    The methods are what the ranks do together, so all of them have to call them, in one order.
    Alone (world_size 1) each does its work and asks nobody. One that waits in vain raises torch's
    RuntimeError, which `is_lost_peer` knows.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    node: int = 0
    nodes: int = 1
    launch: str | None = None  # names the launcher, the same for all its restarts; None: none

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes the files that are written once."""
        return self.rank == 0

    def is_launch_of(self, record: dict[str, Any]) -> bool:
        """Whether what left a record was started by this same launch, so that this goes on."""
        return self.launch is not None and record.get("launch") == self.launch

    @classmethod
    def from_environment(cls) -> Ranks:
        """What torchrun set; a process started alone is rank 0 of 1. Raises UsageError."""

        def number(name: str, default: int) -> int:
            text = os.environ.get(name, str(default))
            if not text.isdecimal():
                raise UsageError(
                    f"{name}={text} in the environment is not a whole number: unset it"
                )
            return int(text)

        world_size = number("WORLD_SIZE", 1)
        if world_size == 1:  # then a RANK that something else has set means nothing
            return cls(launch=launch_name())
        if not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise UsageError(
                f"WORLD_SIZE={world_size} is set without RANK, MASTER_ADDR and MASTER_PORT: start "
                "several processes with torchrun, or unset it"
            )
        return cls(
            number("RANK", 0),
            world_size,
            number("LOCAL_RANK", 0),
            number("GROUP_RANK", 0),
            number("GROUP_WORLD_SIZE", 1),
            launch_name(),
        )

    @contextlib.contextmanager
    def connected(self, *, use_gpu: bool, timeout: int) -> Iterator[None]:
        """Talk to the other processes within the block; one silent for `timeout` s is lost."""
        if self.world_size == 1:
            yield
            return
        backend = "cpu:gloo,cuda:nccl" if use_gpu and torch.cuda.is_available() else "gloo"
        limit = timedelta(seconds=timeout)
        store = next(dist.rendezvous("env://", self.rank, self.world_size, timeout=limit))[0]
        store = dist.PrefixStore(name_start(store, self.rank, self.world_size, timeout), store)
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.world_size, timeout=limit
        )
        yield
        dist.destroy_process_group()  # not after an error: it would wait for those who are gone

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Let rank 0 alone print within the block; an exception that leaves it may be printed."""
        with contextlib.ExitStack() as stack:
            if not self.is_main:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield

    def note(self, parallel: str) -> str:
        """How many processes there are and how they share the work, to stand behind the device."""
        if self.world_size == 1:
            return (
                "" if parallel == "ddp" else f"; one process: --parallel {parallel} has no effect"
            )
        machines = f" on {self.nodes} machines" if self.nodes > 1 else ""
        return f"; {self.world_size} processes{machines}, {parallel}"

    def sum(self, *values: float) -> list[float]:
        """The sum of each number over all ranks."""
        if self.world_size == 1:
            return list(values)
        return self.sum_array(np.array(values, np.float64)).tolist()

    def sum_array(self, values: np.ndarray) -> np.ndarray:
        """The sum of an array over all ranks, element by element."""
        if self.world_size == 1:
            return values
        total = torch.from_numpy(values.copy())
        dist.all_reduce(total)
        return total.numpy()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, plain or tensors on the CPU, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """Do something on rank 0 alone; what it returns, plain, or raises, all ranks do."""
        if self.world_size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_main:
            outcome = attempt(work)
        dist.broadcast_object_list(outcome, src=0)
        value, error = outcome
        if error is not None:
            raise error
        return value

    def on_all(self, work: Callable[[], T]) -> T:
        """Do something on every rank; what one of them raises, all do."""
        if self.world_size == 1:
            return work()
        value, error = attempt(work)
        for failed in self.gather(error):
            if failed is not None:
                raise failed
        return value

    def rounds(self, count: int) -> Iterator[tuple[int, bool]]:
        """This rank's numbers of those below `count`, as many on every rank, and whether it counts.

        A rank with one fewer than others does the last one once more, and that does not count.
        """
        for first in range(0, count, self.world_size):
            number = first + self.rank
            yield min(number, count - 1), number < count

    def agree_to_stop(self, stop: StopRequest) -> bool:
        """Whether any rank was asked to stop; then every rank's `stop` says so."""
        if self.world_size == 1:
            return stop.requested
        number = torch.tensor(stop.signal_number or 0)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        if number and not stop.requested:
            stop.signal_number = int(number)
        return bool(number)

    def check_stop(self, stop: StopRequest) -> None:
        """Raise Interrupted on all ranks if one was asked to stop: where nothing is to be saved."""
        if self.agree_to_stop(stop):
            raise Interrupted

    def first_on_node(
        self, name: str, work: Callable[[Callable[[], bool]], T], stop: StopRequest, timeout: int
    ) -> T:
        """Do something long on one process of each machine, and then, quickly, on the others.

        `work` polls what it is given: whether to stop. The polling also tells those who wait that
        it gets on, so that hours do not look like a hang. Raises what `work` does, RunFailed where
        nothing moves for `timeout` seconds, Interrupted.
        """
        if self.world_size == 1:
            return work(lambda: stop.requested)
        store = run_store()
        told = 0.0

        def poll() -> bool:
            nonlocal told
            if time.monotonic() - told > 1:
                store.add(f"{name} beats {self.node}", 1)
                told = time.monotonic()
            return stop.requested

        result = None
        if self.local_rank == 0:
            result, error = attempt(lambda: work(poll))
            store.set(f"{name} ends {self.node}", pickle.dumps(error))
        for node in range(self.nodes):
            self._await_node(store, name, node, stop, timeout)
        return result if self.local_rank == 0 else work(lambda: stop.requested)

    def _await_node(
        self, store: dist.Store, name: str, node: int, stop: StopRequest, timeout: int
    ) -> None:
        beats, since = -1, time.monotonic()
        while not store.check([f"{name} ends {node}"]):
            stop.check()
            now = store.add(f"{name} beats {node}", 0)
            if now != beats:
                beats, since = now, time.monotonic()
            if time.monotonic() - since > timeout:
                raise RunFailed(
                    f"the first process of machine {node} has not got on with {name} for "
                    f"--dist_timeout {timeout} seconds"
                )
            time.sleep(0.1)
        error = pickle.loads(store.get(f"{name} ends {node}"))
        if error is not None:
            raise error

    def is_to_say(self, message: str) -> bool:
        """Whether this process prints an error: of those that have the same one, the first."""
        if self.world_size == 1 or not dist.is_initialized():
            return self.is_main
        try:
            store = run_store()
            store.add("errors", 1)
            return store.add(f"error {hashlib.sha256(message.encode()).hexdigest()}", 1) == 1
        except RuntimeError:  # the launcher is gone
            return True

    def lost_peer(self, timeout: int) -> str | None:
        """What to say of processes that ended or hang; None where one of them said why."""
        missing = "another process"
        with contextlib.suppress(RuntimeError, ValueError):  # no launcher, or not any more
            store = run_store()
            store.add(f"misses others {self.rank}", 1)
            time.sleep(2)  # till those whose fault it is not have told the same
            if store.add("errors", 0):
                return None
            names = range(self.world_size)
            lost = [str(rank) for rank in names if not store.add(f"misses others {rank}", 0)]
            missing = f"rank {' and '.join(lost)}" if lost else missing
        return (
            f"{missing} of {self.world_size} ended, or did not answer for --dist_timeout {timeout} "
            "seconds, so all end; --resume auto goes on from the last checkpoint"
        )


def name_start(store: dist.Store, rank: int, world_size: int, timeout: int) -> str:
    """A name that the processes of this start share, and those of no other.

    A launcher that restarts a run keeps its store, where the dead have left how to reach them. So
    each rank shows a mark of its own, and rank 0 the marks it sees; when every rank has found its
    own among these and said so, they are the living's. Raises RunFailed after `timeout` seconds.
    """
    mark, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    store.set(f"mark {rank}", mark)
    while time.monotonic() < deadline:
        if rank == 0:
            if store.check([f"mark {other}" for other in range(world_size)]):
                marks = [store.get(f"mark {other}").decode() for other in range(world_size)]
                name = " ".join(marks)
                store.set("marks", name)
                if store.check([f"{mark} sees {other}" for other in marks[1:]]):
                    store.set("start", name)
                    return mark
        elif store.check(["marks"]):
            marks = store.get("marks").decode().split()
            if marks[rank] == mark:
                store.set(f"{marks[0]} sees {mark}", "")
                if store.check(["start"]) and mark in store.get("start").decode():
                    return marks[0]
        time.sleep(0.02)
    raise RunFailed(
        f"not all of {world_size} processes came within --dist_timeout {timeout} seconds"
    )


def run_store() -> dist.Store:
    """Where the processes of a run leave notes that others need not wait for."""
    return dist.distributed_c10d._get_default_store()


def check_runs_alone(what: str) -> None:
    """Raise UsageError where a launcher started several processes of what one is enough for."""
    if Ranks.from_environment().world_size > 1:
        raise UsageError(f"{what} runs in one process: start it without torchrun")


def attempt(work: Callable[[], T]) -> list[Any]:
    """[result, None] or [None, error], the error such as can be sent to another process."""
    try:
        return [work(), None]
    except (UsageError, RunFailed, Interrupted) as error:
        return [None, error]
    except OSError as error:
        return [None, OSError(error.errno, error.strerror or str(error), error.filename)]
    except Exception as error:
        if is_lost_peer(error):
            raise
        return [None, RunFailed(traceback.format_exc().strip())]


def is_lost_peer(error: Exception) -> bool:
    """Whether torch means that another process is gone or silent; gloo has no exception for it."""
    words = ("gloo", "Connection closed by peer", "NCCL", "Timed out waiting")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def exit_at_once(status: int) -> NoReturn:
    """End a process among others without the interpreter's clean-up, in which threads of
    torch.distributed at times crash, or wait for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def launch_name() -> str | None:
    """What a launcher's starts and restarts share: torchrun's run id, else its process.

    Its count of restarts is of no use: each machine's launcher counts its own.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id != "none":  # torchrun's word for: none was given
        return run_id
    return json.dumps(process_name(os.getppid()))


def rank_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a rank's own random numbers, from `step` on."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def is_share(tensor: torch.Tensor) -> bool:
    """Whether this rank holds only its share: a DTensor, whose import would take a second."""
    return hasattr(tensor, "full_tensor")


def is_sharded(module: nn.Module) -> bool:
    """Whether each rank holds only its share of the module."""
    return any(is_share(parameter) for parameter in module.parameters())


def distribute(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    *,
    ranks: Ranks,
    parallel: str,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """The module to call in training, whose gradients are means over the ranks.

    ddp: a wrapper around it. fsdp: itself, changed so that each rank keeps its share of weights,
    gradients and optimizer state; `blocks` are put together one at a time, in `dtype`, the rest
    (embedding, head, last norm) in float32, as autocast has it.
    """
    if ranks.world_size == 1:
        return module.to(device)
    if parallel == "ddp":
        module = module.to(device)
        devices = [device] if device.type == "cuda" else None
        with warnings.catch_warnings():
            # What 2.13 says is to replace it is not there before. The one buffer is a constant.
            warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
            return DistributedDataParallel(
                module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (ranks.world_size,))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(module, mesh=mesh)


def without_exchange(module: nn.Module) -> contextlib.AbstractContextManager:
    """Let gradients add up on each rank within the block; sharded ones are exchanged each time,
    since only so they need no more memory than their share."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def no_gradients(module: nn.Module) -> Iterator[None]:
    """Evaluate within the block, and leave of a sharded module the shares alone."""
    if not is_sharded(module):
        with torch.inference_mode():
            yield
        return
    try:
        with torch.no_grad():  # FSDP keeps what it puts together, and trains on ordinary tensors
            yield
    finally:
        for part in module.modules():
            if hasattr(part, "reshard"):
                part.reshard()


def whole_state(module: nn.Module, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The state dict with shares put together, on rank 0; elsewhere it is empty."""
    if not is_sharded(module):
        return module.state_dict() if ranks.is_main else {}
    whole: dict[int, torch.Tensor] = {}  # by parameter: what is tied is put together once
    state = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in whole:
            found = tensor.detach().full_tensor() if is_share(tensor) else tensor
            whole[id(tensor)] = found.cpu() if ranks.is_main else found.new_empty(0)
        state[name] = whole[id(tensor)]
    return state if ranks.is_main else {}


def load_whole_state(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """`load_state_dict` of whole tensors, of which each rank takes its share."""
    if is_sharded(module):
        own = module.state_dict()
        state = {name: share_of(t, own[name]) if name in own else t for name, t in state.items()}
    module.load_state_dict(state)


def share_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's share of a tensor that all ranks have, laid out as `like`."""
    if not is_share(like) or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements
    return distribute_tensor(whole.to(like.device), mesh, placements, src_data_rank=None)


def load_whole_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict` of whole tensors, of which each rank takes its share."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(map(is_share, parameters)):
        shares = {
            index: {
                key: share_of(value, parameters[index]) if torch.is_tensor(value) else value
                for key, value in of_one.items()
            }
            for index, of_one in state["state"].items()
        }
        state = state | {"state": shares}
    optimizer.load_state_dict(state)


# ---------------------------------------------------------------------------- sharded checkpoints

# A folder of the files of torch.distributed.checkpoint, to which every rank adds its shares, and
# state.pt, written last: the plain values and the SHA-256 of every other file. The folder is filled
# under a temporary name. Any number of ranks reads it, also one, into whole or sharded tensors.


def own_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The tensors of model and optimizer that this rank holds, by names of one level."""
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    for index, of_one in optimizer.state_dict()["state"].items():
        for key, value in of_one.items():
            if torch.is_tensor(value):
                tensors[f"optimizer/{index}/{key}"] = value
    return tensors


def plain_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict without its tensors."""
    state = optimizer.state_dict()
    plain = {
        index: {key: value for key, value in of_one.items() if not torch.is_tensor(value)}
        for index, of_one in state["state"].items()
    }
    return state | {"state": plain}


def load_sharded(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, plain: dict[str, Any]
) -> None:
    """Read a sharded checkpoint into model and optimizer, each rank what it holds of them.

    `plain` is the optimizer's state without tensors. Raises RuntimeError for other names or shapes.
    """
    import torch.distributed.checkpoint as dcp

    parameters = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    state = {index: dict(of_one) for index, of_one in plain["state"].items()}
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for name, found in stored.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            like, dtype = parameters[int(index)], found.properties.dtype
            shaped = found.size == like.shape
            place = torch.zeros_like(like, dtype=dtype) if shaped else torch.zeros(found.size)
            tensors[name] = state[int(index)][key] = place
    try:
        with warnings.catch_warnings():
            # Of one process torch warns that it is one, also where it was told.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(tensors, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except dcp.api.CheckpointException as error:
        raise RuntimeError(first_failure(error)) from None
    optimizer.load_state_dict(plain | {"state": state})


def first_failure(error: BaseException) -> str:
    """What torch's exception of a failed checkpoint says of the first rank that failed."""
    rank, (failure, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {failure}"


def hash_file(path: Path) -> str:
    """SHA-256 of a file as the disk has it, in hex."""
    with path.open("rb") as file:
        forget_cached(file)
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_shards(folder: Path, payload: dict[str, Any]) -> None:
    """Raise UsageError where a file of a sharded checkpoint is not the one that was written."""
    for name, digest in payload.get("files", {}).items():
        path = folder / name
        try:
            same = hash_file(path) == digest
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror})") from None
        if not same:
            raise UsageError(f"{path} is damaged: its bytes do not match its SHA-256")


METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": None,  # all of its plain classes
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "torch": {"Size", "float32", "float64", "bfloat16", "float16", "int64", "uint8", "bool"},
}


class MetadataUnpickler(pickle.Unpickler):
    """Reads the index of a sharded checkpoint, which torch pickles, and no code in its place."""

    def find_class(self, module: str, name: str) -> Any:
        """One of the classes that such an index consists of."""
        if module in METADATA_CLASSES and name in (METADATA_CLASSES[module] or {name}):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def check_metadata(path: Path) -> Any:
    """The index of a sharded checkpoint, unpickled as torch must not be let do it unseen.

    Raises UsageError for one that holds code or other things than an index of tensors.
    """
    try:
        with path.open("rb") as file:
            index = MetadataUnpickler(file).load()
        tensors = all(hasattr(entry, "properties") for entry in index.state_dict_metadata.values())
    except Exception as error:  # whatever the damage happens to hit
        raise UsageError(
            f"{path}: is damaged, or carries code that was not run ({error})"
        ) from None
    if not tensors:
        raise UsageError(f"{path}: lists other things than tensors, as no file of ours does")
    return index


def read_back(folder: Path, rank: int) -> None:
    """Compare what a rank wrote with the checksums that torch made of it in memory.

    Each tensor is a zip archive of its own. Raises OSError where the disk has something else.
    """
    for item in check_metadata(folder / ".metadata").storage_data.values():
        if not item.relative_path.startswith(f"__{rank}_"):
            continue
        path = folder / item.relative_path
        with path.open("rb") as file:
            forget_cached(file)
            file.seek(item.offset)
            data = file.read(item.length)
        try:
            broken = zipfile.ZipFile(io.BytesIO(data)).testzip()
        except zipfile.BadZipFile:
            broken = path.name
        if broken:
            raise OSError(errno.EIO, "what was read back is not what was written", str(path))


class ShardedSave:
    """The writing of sharded checkpoints, one at a time, while the training goes on."""

    def __init__(self, ranks: Ranks, timeout: int) -> None:
        self.ranks = ranks
        # Its own, for what it exchanges must not meet what the training does.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self.threads = ThreadPoolExecutor(1)
        self.pending: tuple[Path, Path, dict[str, Any], Future[dict[str, str]]] | None = None

    def begin(self, path: Path, tensors: dict[str, torch.Tensor], payload: dict[str, Any]) -> None:
        """Copy this rank's tensors and begin to write them; `payload` is of plain values.

        Raises OSError on all ranks.
        """
        import torch.distributed.checkpoint as dcp

        assert self.pending is None, "one at a time"
        temporary = path.with_name(f".{path.name}.written.tmp")

        def make() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        self.ranks.on_main(make)
        # What is on the CPU torch would write as it changes.
        copies = {n: t.clone() if t.device.type == "cpu" else t for n, t in tensors.items()}
        written = dcp.async_save(copies, checkpoint_id=temporary, process_group=self.group)
        digests = self.threads.submit(self._digest, written, temporary)
        self.pending = (path, temporary, payload, digests)

    def _digest(self, written: Future, temporary: Path) -> dict[str, str]:
        """Wait until all is written, and read it back; the SHA-256 of this rank's files."""
        import torch.distributed.checkpoint as dcp

        try:
            written.result()
        except dcp.api.CheckpointException as error:
            reason = f"{first_failure(error)}; is a disk full?"
            raise OSError(errno.EIO, reason, str(temporary)) from None
        read_back(temporary, self.ranks.rank)
        names = [path.name for path in temporary.glob(f"__{self.ranks.rank}_*")]
        names += [".metadata"] if self.ranks.is_main else []
        return {name: hash_file(temporary / name) for name in names}

    def is_written(self) -> bool:
        """Whether there is something to publish: every rank has written its share."""
        if self.pending is None:
            return False
        return self.ranks.sum(self.pending[3].done())[0] == self.ranks.world_size

    def publish(self) -> dict[str, Any] | None:
        """Wait for what is being written and give it its name; returns its plain values, if any.

        Raises OSError on all ranks, and then nothing of it is left.
        """
        if self.pending is None:
            return None
        path, temporary, payload, digests = self.pending
        self.pending = None
        try:
            found = self.ranks.gather(self.ranks.on_all(digests.result))
            files = {name: digest for of_rank in found for name, digest in of_rank.items()}
            self.ranks.on_main(lambda: self._rename(path, temporary, payload | {"files": files}))
        finally:
            if self.ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
        return payload

    def _rename(self, path: Path, temporary: Path, payload: dict[str, Any]) -> None:
        save_checkpoint(temporary / STATE_FILE, payload)
        aside = path.with_name(f".{path.name}.removed.tmp")
        if path.exists():  # of this same step, from before the run was resumed or rolled back
            replace(path, aside)
        replace(temporary, path)
        sync_folder(path.parent)
        shutil.rmtree(aside, ignore_errors=True)


# ---------------------------------------------------------------------------- telemetry


class GpuTelemetry:
    """Memory, utilisation, power and energy of an NVIDIA GPU through NVML; silent without one."""

    def __init__(self, device: torch.device) -> None:
        self.handle = None
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self.nvml, self.handle = pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self.start_energy = pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)
        except Exception:  # no driver, no permission, a GPU without the counter: no telemetry
            self.handle = None

    def sample(self) -> dict[str, float]:
        """Bytes in use, % busy, watts, joules since the start; an empty dict where unknown."""
        if self.handle is None:
            return {}
        try:
            energy = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)
            return {
                "gpu_memory_used": self.nvml.nvmlDeviceGetMemoryInfo(self.handle).used,
                "gpu_utilization": self.nvml.nvmlDeviceGetUtilizationRates(self.handle).gpu,
                "gpu_power_watts": self.nvml.nvmlDeviceGetPowerUsage(self.handle) / 1000,
                "gpu_energy_joules": (energy - self.start_energy) / 1000,
            }
        except self.nvml.NVMLError:
            return {}


# Dense bfloat16 (V100, T4: float16) tensor-core rates of the makers' data sheets, in FLOP/s.
GPU_PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
    "4090": 165e12,
    "3090": 71e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is measured against: the data sheet's, else a large product timed here."""
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for key, rate in GPU_PEAK_FLOPS.items():
            if re.search(rf"\b{key}\b", name):
                return rate
    size = 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def environment() -> dict[str, Any]:
    """Versions and machine of this run, for run.json."""
    commit = (
        subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
        if shutil.which("git")
        else ""
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "git_commit": commit or None,
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


# ---------------------------------------------------------------------------- metrics


class MetricsLog:
    """`metrics.jsonl`: one JSON line per optimizer step, each step once, also over resumes.

    `records` are the last `window` of them; the others are in the file alone, however long the run.
    """

    def __init__(self, path: Path, last_step: int, *, window: int = 1) -> None:
        """Open the log to go on after `last_step`; later lines belong to steps to be made again."""
        self.path, self.window = path, window
        self.unwritten: list[dict[str, Any]] = []  # what the disk did not take
        self.file: BinaryIO | None = None
        self.rewind(last_step)

    def append(self, record: dict[str, Any]) -> None:
        """Add one step's record and hand it to the system, so that it outlives the process.

        Where the disk takes nothing it is kept in memory, and the next record brings it along.
        """
        self.records.append(record)
        self.unwritten.append(record)
        self._write()

    def rewind(self, last_step: int) -> None:
        """Take back what came after `last_step`: those steps are made again."""
        self.close()
        self.records: deque[dict[str, Any]] = deque(maxlen=self.window)
        self.end = 0  # of the file's lines that stay
        for record, end in _whole_records(self.path):
            if record["step"] <= last_step:
                self.records.append(record)
                self.end = end
        written = self.records[-1]["step"] if self.records else 0
        self.unwritten = [r for r in self.unwritten if written < r["step"] <= last_step]
        self.records.extend(self.unwritten)
        self._write()

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # closing flushes: a full disk fails again here
                self.file.close()
        self.file = None

    def _write(self) -> None:
        data = "".join(json.dumps(record) + "\n" for record in self.unwritten).encode()
        try:
            if self.file is None:
                self.file = self.path.open("ab")
                self.file.truncate(self.end)  # cuts off what a failed write or a crash left
            self.file.write(data)
            self.file.flush()
        except OSError as error:
            self.close()
            tqdm.write(f"warning: {self.path} was not written ({error}); the run goes on")
        else:
            self.end += len(data)
            self.unwritten.clear()


class NoLog:
    """The log of ranks that write none."""

    records: Sequence[dict[str, Any]] = ()

    def append(self, record: dict[str, Any]) -> None:
        """Rank 0 writes it."""

    def rewind(self, last_step: int) -> None:
        """Rank 0 does it."""

    def close(self) -> None:
        """Nothing is open."""


def _whole_records(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The records of a metrics file, and where in it each ends; lines that a crash cut are none."""
    end = 0
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            end += len(line)
            with contextlib.suppress(ValueError):
                if line.endswith(b"\n"):
                    yield json.loads(line), end


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file, one by one; a last line cut short by a crash is left out."""
    return (record for record, _ in _whole_records(path))


def loss_curve_svg(records: list[dict[str, Any]], title: str) -> str:
    """The training and validation loss over the steps as an SVG picture for any browser."""
    width, height, left, top = 860, 460, 70, 50
    plot_width, plot_height = width - left - 30, height - top - 60
    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    val = [(r["step"], r["val_loss"]) for r in records if r.get("val_loss") is not None]
    points = train + val
    if not points:
        return ""
    last_step = max(step for step, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = (high - low) or 1.0

    def place(step: float, loss: float) -> str:
        x = left + plot_width * step / max(1, last_step)
        return f"{x:.1f},{top + plot_height * (high - loss) / span:.1f}"

    def line(series: list[tuple[float, float]], color: str) -> str:
        path = " ".join(place(*point) for point in series)
        return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="28" font-size="17">{html.escape(title)}</text>',
    ]
    for i in range(6):
        loss, step = low + span * i / 5, last_step * i / 5
        x, y = place(step, loss).split(",")
        parts += [
            f'<line x1="{left}" x2="{left + plot_width}" y1="{y}" y2="{y}" stroke="#ddd"/>',
            f'<text x="{left - 8}" y="{y}" dy="4" text-anchor="end">{loss:.2f}</text>',
            f'<text x="{x}" y="{height - 38}" text-anchor="middle">{step:,.0f}</text>',
        ]
    parts += [
        line(train, "#4477aa"),
        line(val, "#cc3311"),
        *(
            f'<circle cx="{place(*p).split(",")[0]}" cy="{place(*p).split(",")[1]}" r="3" '
            'fill="#cc3311"/>'
            for p in val
        ),
        f'<text x="{left + plot_width / 2}" y="{height - 12}" text-anchor="middle">'
        "optimizer step</text>",
        f'<text x="{left + plot_width - 210}" y="28" fill="#4477aa">training loss</text>',
        f'<text x="{left + plot_width - 100}" y="28" fill="#cc3311">validation loss</text>',
        "</svg>\n",
    ]
    return "\n".join(parts)
