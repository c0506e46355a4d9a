"""What a file is by its first bytes, whatever its name, where it is no text.

Knows how each kind begins and what to do with it; reads none of them.
"""

from __future__ import annotations

import re
import tarfile
from pathlib import Path
from typing import NamedTuple

HEAD_BYTES = 1024  # enough to tell every kind; tar has its sign at 257
TAIL_BYTES = 1 << 16  # of a zip, where the names of what it holds are
CONTROLS = bytes({*range(32)} - {*b"\t\n\v\f\r\x1b"})  # in no text, save by accident
BINARY_SHARE, FEW_CONTROLS = 0.01, 10  # more of them than either: no text in any encoding


class Kind(NamedTuple):
    """A kind of file that is no text, and what to do to train on what is in it."""

    name: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}, no text: {self.remedy}"


UNPACK = "unpack it, then name the folder"
SAVE = "save its words as .txt"
LEAVE_OUT = "leave it out"
MODEL = "--pretrained_model_path takes a model, where it can be read"
TAR = Kind("a tar archive", "unpack it with tar -xf FILE, then name the folder")
PACKED = Kind("a file that is compressed twice", "unpack it")
# (place of the sign, sign, kind); a sign of plain letters counts only before bytes of no text.
SIGNS: list[tuple[int, bytes, Kind]] = [
    (0, b"%PDF-", Kind("a PDF", "pdftotext FILE FILE.txt makes text of it")),
    (0, b"{\\rtf", Kind("a document of a word processor (RTF)", SAVE)),
    (0, b"\xd0\xcf\x11\xe0", Kind("an old Office document", SAVE)),
    (257, b"ustar", TAR),
    (0, b"7z\xbc\xaf\x27\x1c", Kind("a 7z archive", UNPACK)),
    (0, b"Rar!\x1a\x07", Kind("a rar archive", UNPACK)),
    (0, b"\x04\x22\x4d\x18", Kind("an lz4 file", "lz4 -d FILE unpacks it")),
    (0, b"\x1f\x9d", Kind("a .Z archive", "uncompress FILE unpacks it")),
    (0, b"]\x00\x00", Kind("an .lzma archive", "xz -d FILE unpacks it")),
    (0, b"\x1f\x8b", PACKED),
    (0, b"(\xb5/\xfd", PACKED),
    (0, b"\xfd7zXZ", PACKED),
    (0, b"BZh91AY&SY", PACKED),
    (0, b"PAR1", Kind("a parquet table", "unpack it, or name it as data (--pretrain_data)")),
    (0, b"ARROW1\0\0", Kind("an Arrow table", "unpack it, or name it as data (--pretrain_data)")),
    (0, b"\xff" * 4, Kind("an Arrow stream", "unpack it, or name it as data (--pretrain_data)")),
    (0, b"PARE", Kind("an encrypted parquet table", "decrypt it")),
    (0, b"FEA1", Kind("a Feather table of version 1", "write it anew as .parquet")),
    (0, b"ORC", Kind("an ORC table", "write it anew as .parquet")),
    (0, b"Obj\x01", Kind("an Avro table", "write it anew as .parquet")),
    (0, b"\x89HDF\r\n", Kind("an HDF5 file", "write its texts as .jsonl")),
    (0, b"SQLite format 3", Kind("an SQLite database", "sqlite3 -csv makes a .csv of a table")),
    (0, b"\x93NUMPY", Kind("a NumPy array", "ids of another vocabulary are not read; name texts")),
    (0, b"GGUF", Kind("a model (GGUF)", MODEL)),
    (0, b"\x89PNG", Kind("an image", LEAVE_OUT)),
    (0, b"\xff\xd8\xff", Kind("an image", LEAVE_OUT)),
    (0, b"GIF8", Kind("an image", LEAVE_OUT)),
    (0, b"BM", Kind("an image", LEAVE_OUT)),
    (0, b"II*\0", Kind("an image", LEAVE_OUT)),
    (0, b"MM\0*", Kind("an image", LEAVE_OUT)),
    (4, b"ftyp", Kind("a video, an image or audio", LEAVE_OUT)),
    (0, b"\x1aE\xdf\xa3", Kind("a video", LEAVE_OUT)),
    (0, b"RIFF", Kind("audio, an image or a video", LEAVE_OUT)),
    (0, b"ID3", Kind("audio", LEAVE_OUT)),
    (0, b"\xff\xfb", Kind("audio", LEAVE_OUT)),
    (0, b"OggS", Kind("audio", LEAVE_OUT)),
    (0, b"fLaC", Kind("audio", LEAVE_OUT)),
    (0, b"\x7fELF", Kind("a program", LEAVE_OUT)),
    (0, b"MZ", Kind("a program", LEAVE_OUT)),
    (0, b"version https://git-lfs", Kind("a pointer of Git LFS", "git lfs pull fetches the file")),
]
PICKLE = Kind("a pickle", f"it is never opened, as it may run code; {MODEL}")
SAFETENSORS = Kind("a model (safetensors)", MODEL)
# By the names of what a zip holds.
ZIPS: list[tuple[bytes, Kind]] = [
    (b"word/document.xml", Kind("a Word document (.docx)", SAVE)),
    (b"xl/workbook", Kind("an Excel table (.xlsx)", "save it as .csv in UTF-8")),
    (b"ppt/presentation.xml", Kind("a PowerPoint file (.pptx)", SAVE)),
    (b"META-INF/container.xml", Kind("an e-book (.epub)", SAVE)),
    (b"META-INF/manifest.xml", Kind("an OpenDocument file", SAVE)),
    (b"/data.pkl", Kind("a model or tensors of PyTorch", MODEL)),
    (b".npy", Kind("NumPy arrays (.npz)", "ids of another vocabulary are not read; name texts")),
]
ZIP = Kind("a zip archive", UNPACK)
UNKNOWN = Kind("binary, of an unknown kind", "leave it out, or save what it holds as .txt")
HTML = re.compile(rb"\s*(?:<!doctype html|<html[\s>])", re.IGNORECASE)


def binary_kind(head: bytes, path: Path | None = None) -> Kind | None:
    """What a file is that begins so; None where it may be text. `path` is a zip's, to look into."""
    for at, sign, kind in SIGNS:
        if head.startswith(sign, at) and (not sign.isalnum() or count_controls(head[:HEAD_BYTES])):
            return kind
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip_kind(path)
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return PICKLE
    if head[4:9] == b"\0\0\0\0{" and b'"' in head:  # the length of a JSON header in 8 bytes
        return SAFETENSORS
    return TAR if _is_old_tar(head) else None


def count_controls(data: bytes) -> int:
    """How many bytes are such that no text has them, save by accident."""
    return len(data) - len(data.translate(None, CONTROLS))


def _zip_kind(path: Path | None) -> Kind:
    tail = b""
    if path is not None:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            tail = file.read(TAIL_BYTES)
    return next((kind for sign, kind in ZIPS if sign in tail), ZIP)


def _is_old_tar(head: bytes) -> bool:
    """Whether a checksum stands where tar without a sign of its own has it."""
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def looks_binary(data: bytes) -> bool:
    """Whether the beginning of a file, in no encoding with zeros in it, is no text at all."""
    return count_controls(data) > max(FEW_CONTROLS, BINARY_SHARE * len(data))


def is_html(head: bytes) -> bool:
    """Whether a web page begins so."""
    return HTML.match(head.removeprefix(b"\xef\xbb\xbf")) is not None
