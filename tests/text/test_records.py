"""minllama/text/records.py and what it stands on: JSON, CSV, parquet and Arrow as records.

pyarrow, zstandard and Python's own csv write what is read here.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minllama.system.errors import UsageError
from minllama.system.unpacking import read_unpacked
from minllama.text.documents import read_documents
from minllama.text.labelled import class_names, read_rows
from minllama.text.reading import Reading
from minllama.text.records import places, read_records
from minllama.text.token_cache import build_or_load
from tokenizer import Tokenizer

TEXTS = [
    "Hello\nworld",
    'a,b "q" 从前',
    "x\r\ny",
    "  ",
    "",
    " lead",
    "tab\tand ;",
    "\U0001f98a",
] * 40


def pyarrow_table(path: Path, **columns: object) -> Path:
    """A table of these columns, in the format that the name says; `a.stream` is an Arrow stream."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    feather = pytest.importorskip("pyarrow.feather")
    table = pyarrow.table(columns)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=64)
    elif path.suffix == ".feather":
        feather.write_feather(table, path, compression="zstd")
    else:
        opened = pyarrow.ipc.new_stream if path.suffix == ".stream" else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as file, opened(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=50)
    return path


def csv_table(path: Path, delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["n", "Text"])
        writer.writerows(enumerate(TEXTS))
    return path


def zst(data: bytes) -> bytes:
    """Two frames, as programs that run in parallel write them."""
    zstandard = pytest.importorskip("zstandard")
    return zstandard.compress(data[:700]) + zstandard.compress(data[700:])


def jsonl(path: Path, pack: Callable[[bytes], bytes] = bytes) -> Path:
    lines = "".join(json.dumps({"n": n, "text": text}) + "\n" for n, text in enumerate(TEXTS))
    path.write_bytes(pack(lines.encode()))
    return path


def columns() -> dict[str, object]:
    return {"n": range(len(TEXTS)), "text": TEXTS}


MADE: dict[str, Callable[[Path], Path]] = {
    "b.jsonl.gz": lambda path: jsonl(path, gzip.compress),
    "b.jsonl.bz2": lambda path: jsonl(path, bz2.compress),
    "b.jsonl.xz": lambda path: jsonl(path, lambda data: lzma.compress(data) + bytes(8)),
    "b.jsonl.zst": lambda path: jsonl(path, zst),
    "b.parquet": lambda path: pyarrow_table(path, **columns()),
    "b.feather": lambda path: pyarrow_table(path, **columns()),
    "b.arrow": lambda path: pyarrow_table(path, **columns()),
    "b.stream": lambda path: pyarrow_table(path, **columns()),
    "no_suffix": lambda path: pyarrow_table(path.with_name("c.parquet"), **columns()).rename(path),
    "b.csv": csv_table,
    "b.tsv": lambda path: csv_table(path, "\t"),
}


@pytest.mark.parametrize("name", MADE)
def test_the_tokens_are_those_of_the_same_documents_as_jsonl(name: str, tmp_path: Path) -> None:
    """Every token, document and fingerprint, and so the key by which runs are resumed."""
    tokenizer = Tokenizer()
    found = []
    for path in (jsonl(tmp_path / "a.jsonl"), MADE[name](tmp_path / name)):
        cache = build_or_load([path], tokenizer, Reading(), tmp_path / "cache")
        tables = (cache.document_starts, cache.document_bytes, cache.fingerprints)
        found.append((cache.key, cache.tokens[:].tobytes(), [each.tolist() for each in tables]))
    assert found[0] == found[1] and len(found[0][2][0]) == len([t for t in TEXTS if t.strip()])


def test_fields_inside_fields_and_nulls(tmp_path: Path) -> None:
    """Dictionaries, large strings and views are strings; a null row is none, as in JSON."""
    pyarrow = pytest.importorskip("pyarrow")
    path = pyarrow_table(
        tmp_path / "a.parquet",
        turns=[[{"role": "user", "content": "Hi"}, {"role": "x", "content": "Yo"}], None],
        meta=[{"a": {"b": "deep"}}, {"a": None}],
        word=pyarrow.array(["x", "x"]).dictionary_encode(),
        view=pyarrow.array(["v", None], pyarrow.string_view()),
    )
    for field, expected in (
        ("turns", ["Hi\nYo"]),
        ("turns.content", ["Hi", "Yo"]),
        ("meta.a.b", ["deep"]),
        ("word", ["x", "x"]),
        ("view", ["v"]),
    ):
        blocks = read_documents(path, Reading(text_field=field))
        assert [block.text for block in blocks] == expected
    assert [n for n, _ in read_records(path)] == [1, 2]
    assert places(path)(2) == f"{path}, row 2" and places(Path("a.csv"))(2) == "a.csv:2"


def refused(path: Path, words: str, **reading: str) -> None:
    with pytest.raises(UsageError, match=words) as raised:
        list(read_documents(path, Reading(**reading)))
    message = str(raised.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 600


def test_a_column_that_is_none_names_those_that_are_there(tmp_path: Path) -> None:
    for suffix in (".parquet", ".feather", ".stream"):
        path = pyarrow_table(tmp_path / f"a{suffix}", body=["x"], n=[1])
        refused(path, r"no column 'text' \(has: body, n\); --text_field")
        refused(path, r"row 1: int, not a string, in field 'n' \(has: body, n\)", text_field="n")
    path = tmp_path / "a.csv"
    path.write_text("body;n\nx;1\n", encoding="utf-8")
    refused(path, r"a.csv:1: no column 'text' \(has: body, n\)")


@pytest.mark.parametrize(
    ("text", "records"),
    [
        ("text,n\n\"a\nb\",1\n\n'c',2\n", [(2, ["a\nb", "1"]), (5, ["'c'", "2"])]),
        ("sep=;\ntext;n\na,b;1\n", [(3, ["a,b", "1"])]),
        ('text\tn\n"so" it is\t1\n"open\t2\n', [(2, ['"so" it is', "1"]), (3, ['"open', "2"])]),
        ('text\tn\n"two\nlines"\t1\n', [(2, ["two\nlines", "1"])]),
        ("", []),
    ],
)
def test_csv_as_programs_write_it(text: str, records: list, tmp_path: Path) -> None:
    """Quoted line ends, Excel's first line, GLUE's TSV without quoting, pandas' with."""
    path = tmp_path / ("a.tsv" if "\t" in text else "a.csv")
    path.write_text(text, encoding="utf-8")
    read = [(number, [*record.values()]) for number, record in read_records(path)]
    assert read == records


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('text,n\na,1\n"b c', r"a.csv:3: not CSV \(unexpected end of data\)"),
        ("text,n\na,1\nb, c,2\n", "a.csv:3: 3 cells, and the first line names 2"),
        ('text,n\n"he said "no"",1\n', "a.csv:2: not CSV"),
        ("text,text\na,b\n", "a.csv:1: has the column 'text' more than once"),
        ("text,n\n\xff\n", "a.csv:2: byte 0xff is not UTF-8"),
    ],
)
def test_csv_that_is_none(text: str, words: str, tmp_path: Path) -> None:
    """Half of a text was once a text, and the rest of the row was lost without a word."""
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode("latin-1"))
    refused(path, words)


def test_a_cell_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open double quote makes one cell of a file of any size."""
    monkeypatch.setattr("minllama.text.records.CELL_CHARS", 10_000)
    path = tmp_path / "a.csv"
    path.write_text('text,n\n"a' + "word\n" * 10_000, encoding="utf-8")
    refused(path, r"a.csv:2: not CSV \(field larger than field limit")


# ---------------------------------------------------------------------------- attacks


@pytest.mark.parametrize("suffix", [".parquet", ".feather", ".arrow", ".stream"])
def test_tables_that_are_cut_off_or_damaged(suffix: str, tmp_path: Path) -> None:
    """One line of error, or the same documents; never another exception, and no crash."""
    whole = pyarrow_table(tmp_path / f"a{suffix}", **columns()).read_bytes()
    path = tmp_path / f"b{suffix}"
    for size in (9, 70, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:size])
        refused(path, "damaged table|not such a file|no column")
    random = np.random.default_rng(0)
    for _ in range(100):
        data = bytearray(whole)
        at = (
            random.integers(0, len(data), 3)
            if random.random() < 0.5
            else random.integers(1, 300, 3)
        )
        for place in at:
            data[-place] = random.integers(256)
        path.write_bytes(data)
        try:
            for _ in read_documents(path, Reading()):
                pass
        except UsageError as error:
            assert "\n" not in str(error)


def test_an_arrow_message_that_claims_more_than_there_is(tmp_path: Path, monkeypatch) -> None:
    """pyarrow allocates what is claimed, and 100 kB of a compressed feather file were 4 GB."""
    path = pyarrow_table(tmp_path / "a.stream", **columns())
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:4] + struct.pack("<i", 1 << 30) + data[8:])
    refused(path, "damaged table .*length is wrong")
    monkeypatch.setattr("minllama.system.arrow_messages.MESSAGE_BYTES", 10**6)
    path = pyarrow_table(tmp_path / "b.feather", text=["y" * 10**6] * 3)
    assert path.stat().st_size < 10**4
    refused(path, "a batch of 3 rows unpacks to 3,000,.*smaller ones")


def test_a_page_of_parquet_that_claims_more_than_is_good(tmp_path: Path, monkeypatch) -> None:
    """A page is unpacked as a whole: 100 kB were 2 GB, and 5 GB in pyarrow."""
    monkeypatch.setattr("minllama.system.parquet_pages.PAGE_BYTES", 10**6)
    path = pyarrow_table(tmp_path / "a.parquet", text=["y" * 10**6])
    refused(path, "a page of the column 'text' unpacks to 1,000,0.*smaller row groups")


def test_one_text_for_many_rows_is_in_memory_once(tmp_path: Path) -> None:
    """A dictionary of one text of 20 MB and 5,000 rows of it are 100 GB in a file of kilobytes."""
    pyarrow = pytest.importorskip("pyarrow")
    text = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 5000, pyarrow.int32()), pyarrow.array(["x" * 20_000_000])
    )
    path = pyarrow_table(tmp_path / "a.feather", text=text)
    texts = [record["text"] for _, record in read_records(path)]
    assert len(texts) == 5000 and len({id(text) for text in texts}) <= 5


def test_lists_of_nothing_do_not_fill_the_memory(tmp_path: Path, monkeypatch) -> None:
    """Nulls take no bytes in a file, and eight each in a list of Python's."""
    pyarrow = pytest.importorskip("pyarrow")
    monkeypatch.setattr("minllama.system.tables.BATCH_VALUES", 10**5)
    lists = pyarrow.array([[None] * 10**6], pyarrow.list_(pyarrow.string()))
    path = pyarrow_table(tmp_path / "a.parquet", text=lists)
    refused(path, "1,000,000 values in the lists of a few rows")
    path = pyarrow_table(tmp_path / "a.feather", text=pyarrow.nulls(10**6))
    refused(path, "rows in a few bytes")


@pytest.mark.parametrize("suffix", [".zst", ".xz", ".bz2", ".gz"])
def test_compressed_files_that_are_cut_off_or_bombs(suffix, tmp_path, monkeypatch) -> None:
    """A cut-off .zst ended without a word: zstandard's own reader takes it for the end."""
    pack = {".zst": zst, ".xz": lzma.compress, ".bz2": bz2.compress, ".gz": gzip.compress}[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    data = pack(b"".join(b'{"text": "document %d"}\n' % n for n in range(20_000)))
    for size in (len(data) - 3, len(data) // 2, 20):
        path.write_bytes(data[:size])
        refused(path, "damaged .* file .*fetch it again")
    path.write_bytes(data + b"junk")
    refused(path, "damaged .* file")
    path.write_bytes(b"plain text")
    refused(path, f"named {suffix}, but not a")
    monkeypatch.setattr("minllama.text.reading.LINE_CHARS", 1 << 20)
    path.write_bytes(pack(b'{"text": "' + b"a" * (1 << 23)))
    refused(path, "a line of more than 1,048,576 characters")


def test_what_an_archive_may_ask_for(tmp_path: Path) -> None:
    """A .xz may ask for 4 GB to be unpacked in, a .zst for 2."""
    path = tmp_path / "a.txt.xz"
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 29}]
    path.write_bytes(lzma.compress(b"hello", filters=filters))
    refused(path, "Memory usage limit exceeded")
    zstandard = pytest.importorskip("zstandard")
    settings = zstandard.ZstdCompressionParameters(window_log=30)
    packed = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path = tmp_path / "a.txt.zst"
    path.write_bytes(packed.compress(bytes(10**6)) + packed.flush())
    refused(path, "more than 128 MB: zstd -d --long=31")


# ---------------------------------------------------------------------------- labelled


def test_labels_in_columns_of_any_name(tmp_path: Path) -> None:
    """The same rows from JSON, CSV and parquet; numbers, names, and none."""
    rows = [("a good film", "pos"), ("a bad\none", "neg"), ("who knows", None)]
    reading = Reading(text_field="review.text", label_field="stars")
    records = [{"review.text": text, "stars": stars} for text, stars in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    nested = [{"text": text} for text, _ in rows]
    pyarrow_table(tmp_path / "a.parquet", review=nested, stars=[stars for _, stars in rows])
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("review.text", "Stars"), *rows])
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        read = read_rows(tmp_path / name, reading)
        assert [(row.sentence, row.label) for row in read] == [
            ("a good film", "pos"), ("a bad one", "neg"), ("who knows", ""),
        ]  # fmt: skip
    with pytest.raises(
        UsageError, match="a.csv:2: no --label_field grade .has: Stars, review.text"
    ):
        read_rows(tmp_path / "a.csv", Reading(text_field="review.text", label_field="grade"))


def test_the_hub_s_names_of_classes(tmp_path: Path) -> None:
    """A data set of the hub has numbers, and their names beside them."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for feature, expected in (
        ({"names": ["neg", "pos"], "_type": "ClassLabel"}, ["neg", "pos"]),
        ({"names": ["neg", "neg"]}, None),
        ({"names": 5}, None),
        ({"dtype": "int64"}, None),
    ):
        stored = {b"huggingface": json.dumps({"info": {"features": {"label": feature}}}).encode()}
        table = pyarrow.table({"text": ["a", "b"], "label": [0, 1]})
        parquet.write_table(table.replace_schema_metadata(stored), tmp_path / "a.parquet")
        assert class_names(tmp_path / "a.parquet", Reading()) == expected
    assert class_names(jsonl(tmp_path / "a.jsonl"), Reading()) is None


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pyarrow_table(tmp_path / "a.parquet", text=["a"])
    packed = jsonl(tmp_path / "a.jsonl.zst", zst)

    def absent(name: str):
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", absent)
    refused(path, "reading it needs another package: pip install pyarrow")
    refused(packed, "reading it needs another package: pip install zstandard")


def test_a_stream_of_bytes_is_not_kept(tmp_path: Path) -> None:
    """The largest block of an unpacked file is the one asked for, whatever the file holds."""
    packs = {".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zst}
    for suffix, pack in packs.items():
        data = pack(bytes(1 << 24))
        blocks = read_unpacked(io.BytesIO(data), tmp_path / f"a{suffix}", 1 << 16)
        sizes = [len(block) for block in blocks]
        assert sum(sizes) == 1 << 24 and max(sizes) <= 1 << 16
