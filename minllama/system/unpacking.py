"""Compressed files as the bytes in them: .gz, .bz2, .xz and .zst, recognised by their first bytes.

Unpacked in pieces: a few kB may hold GBs, which nobody needs at once.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from minllama.system.errors import UsageError
from minllama.system.packages import import_optional

COMPRESSED_SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstandard"}
PACKED_BYTES = 1 << 14  # read at once
ZSTD_BYTES = 1 << 10  # unpack to 32 MB at most
XZ_MEMORY = 1 << 28  # the dictionary that a file may ask for; xz -9 asks for 64 MB


def uncompressed_name(path: Path) -> str:
    """A file's name without `.gz` and the like: `a.jsonl` of `a.jsonl.gz`."""
    return path.stem if path.suffix.lower() in COMPRESSED_SUFFIXES else path.name


def compression_of(head: bytes) -> str | None:
    """How a file is compressed that begins so; None where it is not."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return "bzip2"
    if head.startswith(b"\xfd7zXZ\x00"):
        return "xz"
    skippable = head[1:4] == b"*M\x18" and head[0] >> 4 == 5
    return "zstandard" if skippable or head.startswith(b"(\xb5/\xfd") else None


def read_unpacked(file: BinaryIO, path: Path, block_bytes: int) -> Iterator[bytes]:
    """The bytes of an opened file, unpacked where it is compressed, in blocks of about so many.

    Raises UsageError where it is damaged or cut off, or is not what its name says.
    """
    head = file.read(16)
    file.seek(0)
    kind, named = compression_of(head), COMPRESSED_SUFFIXES.get(path.suffix.lower())
    if named is not None and kind is None:
        raise UsageError(f"{path}: named {path.suffix}, but not a {named} file")
    try:
        if kind in (None, "gzip"):
            stream = gzip.GzipFile(fileobj=file) if kind else file
            while data := stream.read(block_bytes):
                yield data
        else:
            yield from _unpacked_frames(file, path, kind, block_bytes)
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, kind, error) from None
    except OSError as error:
        if kind == "bzip2" and error.errno is None:  # of its decompressor, not of the disk
            raise _damaged(path, kind, error) from None
        raise


def _unpacked_frames(file: BinaryIO, path: Path, kind: str, block_bytes: int) -> Iterator[bytes]:
    """What is in a file of frames, one after the other, as programs that run in parallel write."""
    rest = b""
    while rest or (rest := file.read(PACKED_BYTES)):
        if kind == "xz" and not rest.strip(b"\0"):  # its padding
            rest = b""
            continue
        frame = _decompressor(kind, path)
        while not frame.eof:
            data = b""
            if kind == "zstandard" or frame.needs_input:
                rest = rest or file.read(PACKED_BYTES)
                if not rest:
                    raise EOFError("it is cut off")
                size = ZSTD_BYTES if kind == "zstandard" else len(rest)
                data, rest = rest[:size], rest[size:]
            if kind == "zstandard":
                yield from _decompressed_zstd(frame, data, path, block_bytes)
            elif data := frame.decompress(data, block_bytes):
                yield data
        rest = frame.unused_data + rest


def _decompressor(kind: str, path: Path) -> Any:
    if kind == "xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)
    if kind == "bzip2":
        return bz2.BZ2Decompressor()
    zstandard = import_optional("zstandard", f"{path}: reading it")
    return zstandard.ZstdDecompressor().decompressobj()


def _decompressed_zstd(frame: Any, data: bytes, path: Path, block_bytes: int) -> Iterator[bytes]:
    zstandard = import_optional("zstandard", f"{path}: reading it")
    try:
        unpacked = frame.decompress(data)
    except zstandard.ZstdError as error:
        if "memory" in str(error):
            remedy = "zstd -d --long=31 FILE unpacks it"
            raise UsageError(f"{path}: unpacking it needs more than 128 MB: {remedy}") from None
        raise _damaged(path, "zstandard", error) from None
    for start in range(0, len(unpacked), block_bytes):
        yield unpacked[start : start + block_bytes]


def _damaged(path: Path, kind: str | None, error: Exception) -> UsageError:
    return UsageError(f"{path}: damaged {kind} file ({error}); fetch it again")
