"""What a file is about is read from its beginning, whatever the file is."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

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
