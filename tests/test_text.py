"""minllama/text.py: finding text files, and reading them as documents."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import FRAGMENTS

from minllama import text as text_module
from minllama.errors import UsageError
from minllama.text import (
    Reading,
    find_text_files,
    is_labelled,
    read_blocks,
    read_documents,
    read_lines,
    split_labelled,
)

# ---------------------------------------------------------------------------- finding files


def test_find_text_files(tmp_path: Path) -> None:
    """Folders at any depth, globs, names with brackets; sorted, none twice."""
    for name in ["b.txt", "a/c.jsonl", "a/d.txt.gz", "a/skip.png", "x[1].txt"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x", encoding="utf-8")
    names = [tmp_path / "x[1].txt", tmp_path / "*.txt", tmp_path]
    found = [p.relative_to(tmp_path).as_posix() for p in find_text_files(names)]
    assert found == ["x[1].txt", "b.txt", "a/c.jsonl", "a/d.txt.gz"]


def test_text_files_that_are_not_there(tmp_path: Path) -> None:
    """The flag and the pattern are named, and the command that fetches a public file."""
    for pattern, words in (
        ("nothing.txt", "nothing.txt: no such file or folder$"),
        ("*.md", r"\*.md: matches no file$"),
        ("sst-train.txt", "no such file or folder; python data/download.py sst"),
    ):
        with pytest.raises(UsageError, match=f"--train .*{words}"):
            find_text_files([tmp_path / pattern], flag="--train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="--pretrain_data .*holds no .txt"):
        find_text_files([tmp_path / "empty"])
    with pytest.raises(UsageError, match="no file is named"):
        find_text_files([])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_refused(tmp_path: Path) -> None:
    """Opening a FIFO that nobody writes to hung for ever."""
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UsageError, match="not a regular file"):
        find_text_files([tmp_path / "pipe.txt"])
    for path, words in [(tmp_path / "pipe.txt", "not a regular file"), (tmp_path, "a folder")]:
        with pytest.raises(UsageError, match=words):
            list(read_documents(path, Reading()))


# ---------------------------------------------------------------------------- reading


def documents(path: Path, **options: object) -> list[str]:
    """The documents of a file, each put together from its blocks."""
    found, open_text = [], ""
    for block in read_documents(path, Reading(**options)):
        open_text += block.text
        if block.ends:
            found.append(open_text)
            open_text = ""
    assert not open_text
    return found


def written(path: Path, data: bytes) -> Path:
    """`path` with `data` in it, packed where its name says so."""
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_readers(tmp_path: Path, suffix: str) -> None:
    """BOM off, CRLF to LF, a lone CR stays, blank documents left out; .gz the same."""
    text = written(tmp_path / f"a.txt{suffix}", b"\xef\xbb\xbfone\r\ntwo\r \r\n\n \n\x00three")
    assert documents(text) == ["one\ntwo\r \n\n \n\x00three"]
    assert documents(text, document_per_line=True) == ["one", "two\r ", "\x00three"]
    lines = b'{"text": "a\\r\\nb"}\n\n{"text": " "}\r\n{"text": "c", "n": 1}'
    assert documents(written(tmp_path / f"b.jsonl{suffix}", lines)) == ["a\nb", "c"]
    nested = written(tmp_path / f"c.jsonl{suffix}", b'{"a": {"b": "x"}}\n{"a.b": "y"}')
    assert documents(nested, text_field="a.b") == ["x", "y"]
    labelled = written(tmp_path / f"d.txt{suffix}", b"3 ||| good one .\n-1 ||| a ||| b\n")
    assert is_labelled(labelled) and not is_labelled(text) and not is_labelled(nested)
    assert documents(labelled, sentences_only=True) == ["good one .", "a ||| b"]
    assert documents(labelled) == ["3 ||| good one .\n-1 ||| a ||| b\n"]
    assert documents(text, sentences_only=True) == documents(text)
    assert documents(written(tmp_path / f"e.txt{suffix}", b" \n\t\r\n")) == []


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"one\ntwo \xff\n", "a.txt:2: byte 0xff is not UTF-8"),
        ("a.txt", b"one\n" * 100_000 + b"\xe2\x82", "a.txt:100001: byte 0xe2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl:2: not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "a"}\n', "a.jsonl:2: no field 'text' .has: body"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1: int, not a string"),
        ("a.jsonl", b"[1]", "a.jsonl:1: no field"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1: half a surrogate"),
    ],
)
def test_bad_text(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    """Each is one line that names file and line."""
    with pytest.raises(UsageError, match=words):
        documents(written(tmp_path / name, data))


def test_replaced_bytes(tmp_path: Path) -> None:
    """--encoding_errors replace has U+FFFD where strict reading would end."""
    text = written(tmp_path / "a.txt", b"one \xff two")
    assert documents(text, encoding_errors="replace") == ["one \ufffd two"]
    half = written(tmp_path / "a.jsonl", b'{"text": "x\\ud800y"}')
    assert documents(half, encoding_errors="replace") == ["x\ufffdy"]


def test_damaged_gzip(tmp_path: Path) -> None:
    """A download that broke off, flipped bits, and a .gz that is none."""
    whole = gzip.compress(b"some text " * 1000)
    for data in (whole[:-9], whole[: len(whole) // 2], whole[:12] + b"\xff" + whole[13:]):
        (tmp_path / "a.txt.gz").write_bytes(data)
        with pytest.raises(UsageError, match="a.txt.gz: damaged gzip"):
            documents(tmp_path / "a.txt.gz")
    (tmp_path / "a.txt.gz").write_bytes(b"plain")
    with pytest.raises(UsageError, match="not a gzip file"):
        documents(tmp_path / "a.txt.gz")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_bytes_read_are_those_of_the_file(tmp_path: Path, suffix: str) -> None:
    """A progress bar ends where the file does, packed or not."""
    path = written(tmp_path / f"a.txt{suffix}", bytes(range(128)) * 6000)
    told: list[int] = []
    for _ in read_documents(path, Reading(), on_bytes=told.append):
        pass
    assert sum(told) == path.stat().st_size


def test_a_file_that_grows_while_it_is_read(tmp_path: Path) -> None:
    """A log that grows faster than it is read had no end."""
    path = written(tmp_path / "a.txt", b"word " * 200_000)
    blocks = read_documents(path, Reading())
    next(blocks)
    with open(path, "ab") as file:
        file.write(b"more")
    with pytest.raises(UsageError, match="a.txt: grew while it was read"):
        list(blocks)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    data=st.binary(max_size=200)
    | st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=40).map(
        lambda texts: "".join(texts).encode()
    ),
    size=st.integers(1, 7),
)
def test_blocks_are_python_s_own_decoding(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, size: int
) -> None:
    """Whatever the bytes and the block size: the text of Python's decoder, or an error."""
    path = tmp_path_factory.getbasetemp() / "decoded.txt"
    path.write_bytes(data)
    if data.startswith(b"\x1f\x8b"):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "READ_BYTES", size)
        try:
            expected = data.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            with pytest.raises(UsageError, match=f"decoded.txt:{line}: byte"):
                list(read_blocks(path))
            return
        assert "".join(read_blocks(path)) == expected
        lines = [line for _, line in read_lines(path)]
        assert "\n".join(lines) == expected.removesuffix("\n")


# ---------------------------------------------------------------------------- labelled lines


def test_split_labelled() -> None:
    """At the first bar with spaces around it; the label may be missing, the sentence may not."""
    path = Path("a.txt")
    assert split_labelled(path, 1, "3 ||| a ||| b ") == ("3", "a ||| b")
    assert split_labelled(path, 1, "||| a") == split_labelled(path, 1, " ||| a") == ("", "a")
    assert split_labelled(path, 1, "very good ||| a") == ("very good", "a")
    for line, words in (("1 a", r"a.txt:7: no ` \|\|\| `"), ("1 ||| ", "a.txt:7: no sentence")):
        with pytest.raises(UsageError, match=words):
            split_labelled(path, 7, line)


def test_what_is_labelled(tmp_path: Path) -> None:
    """Every one of the first lines, so that a table with a bar somewhere in it is none."""
    for text, expected in (
        ("0 ||| a\n\n||| b\n", True),
        ("0 ||| a\nb\n", False),
        ("0 ||| a\n" * 20 + "b\n", True),
        ("0 |||a\n", False),
        ("", False),
    ):
        assert is_labelled(written(tmp_path / "a.txt", text.encode())) == expected, text


def test_what_is_labelled_is_seen_in_the_first_block(tmp_path: Path, monkeypatch) -> None:
    """A file of one line was read whole: 300 MB at each start, for the first bytes of it."""
    monkeypatch.setattr(text_module, "READ_BYTES", 100)
    read = []

    def counted(*arguments: object):
        for block in read_blocks(*arguments):
            read.append(len(block))
            yield block

    monkeypatch.setattr(text_module, "read_blocks", counted)
    for start, expected in (("0 ||| ", True), ("", False)):
        path = written(tmp_path / "a.txt", f"{start}{'word ' * 2000}".encode())
        assert is_labelled(path) == expected and read == [100]
        read.clear()
