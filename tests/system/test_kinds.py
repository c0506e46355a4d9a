"""minllama/system/kinds.py: files that are no text are refused by the name of what they are."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from minllama.system.errors import UsageError
from minllama.system.kinds import binary_kind
from minllama.text.documents import read_documents
from minllama.text.reading import Reading


def tar(*, old: bool = False) -> bytes:
    """An archive with one text; `old` has no sign but its checksum, as before POSIX."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"hello"))
    data = bytearray(out.getvalue())
    if old:
        data[257:265], data[148:156] = bytes(8), b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


def packed(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return out.getvalue()


def saved(save, value: object) -> bytes:
    out = io.BytesIO()
    save(value, out)
    return out.getvalue()


def sqlite() -> bytes:
    with sqlite3.connect(":memory:") as database:
        database.execute("CREATE TABLE t (a)")
        return database.serialize()


KINDS = {
    "a tar archive": [tar(), tar(old=True), gzip.compress(tar()), lzma.compress(tar())],
    "a zip archive": [packed("a.txt"), bz2.compress(packed("a.txt"))],
    "a Word document": [packed("[Content_Types].xml", "word/document.xml")],
    "an Excel table": [packed("[Content_Types].xml", "xl/workbook.xml")],
    "an e-book": [packed("mimetype", "META-INF/container.xml")],
    "a PDF": [b"%PDF-1.7\n%\xe2\xe3"],
    "compressed twice": [gzip.compress(gzip.compress(b"hello"))],
    "an SQLite database": [sqlite()],
    "a pickle": [pickle.dumps({"a": 1}, protocol) for protocol in (2, 3, 4, 5)],
    "tensors of PyTorch": [saved(torch.save, {"a": torch.zeros(2)})],
    "a NumPy array": [saved(lambda value, out: np.save(out, value), np.arange(5))],
    "a model (GGUF)": [b"GGUF\3\0\0\0" + bytes(64)],
    "a model (safetensors)": [(64).to_bytes(8, "little") + b'{"a":{"dtype":"F32"}}'],
    "an image": [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\0\x10JFIF", b"GIF89a\1\0", b"BM\0\0\0\0"],
    "audio": [b"ID3\3\0\0", b"OggS\0\2", b"fLaC\0\0", b"RIFF\0\0\0\0WAVE"],
    "a video": [bytes(3) + b" ftypisom\0\0", b"\x1aE\xdf\xa3"],
    "a pointer of Git LFS": [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"],
    "a parquet table": [gzip.compress(b"PAR1\x15\4")],
    "binary, of an unknown kind": [np.random.default_rng(0).bytes(9000)],
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "gb18030"])
def test_no_kind_is_trained_on_in_any_encoding(name: str, encoding: str, tmp_path: Path) -> None:
    """A .docx was "likely cp1252", and with that its bytes were trained on; a tar's headers too."""
    path = tmp_path / "a.txt"
    for data in KINDS[name]:
        path.write_bytes(data)
        with pytest.raises(UsageError) as raised:
            list(read_documents(path, Reading(encoding=encoding)))
        assert name.split()[-1] in str(raised.value) and "no text: " in str(raised.value)
        assert "--encoding" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    ["GGUF is a format.", "PAR1 and ORC", "BM", "MZ, said he", "RIFF", "ID3 tags", "OggS", "", "PK",
     "version 2", "Obj", "{\"a\": 1}", "\x80", "从前", "\ufeffGIF8"],
)  # fmt: skip
def test_texts_that_begin_like_another_kind(text: str) -> None:
    assert binary_kind(f"{text}\n".encode()) is None
    assert binary_kind(f"{text}\n".encode("utf-16")) is None
