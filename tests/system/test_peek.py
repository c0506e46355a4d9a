"""What a file is about is read from its beginning, whatever the file is."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest

from minllama.system.errors import UsageError
from minllama.system.peek import first_object

PACKED = gzip.compress(b'[{"prompt": "a", "response": "b"}]' * 9)


@pytest.mark.parametrize("at", range(10, 30))
def test_a_damaged_gzip_file_is_about_nothing(at: int, tmp_path: Path) -> None:
    """One with a wrong byte behind its header was a traceback, before any command began."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(PACKED)
    assert first_object(path) == {"prompt": "a", "response": "b"}
    path.write_bytes(PACKED[:at] + b"\xff" * 5 + PACKED[at + 5 :])
    assert first_object(path) in ({}, {"prompt": "a", "response": "b"})


def test_a_table_that_cannot_be_read_is_told_of(tmp_path: Path, monkeypatch) -> None:
    """Of dialogues in one that was cut off it was said that --dev is missing."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a"], "response": ["b"]}), path)
    assert first_object(path).keys() == {"prompt", "response"}
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(UsageError, match="a.parquet: damaged table"):
        first_object(path)
    path.write_bytes(whole)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="a.parquet: .* pip install pyarrow"):
        first_object(path)
