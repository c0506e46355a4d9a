"""minllama/text/reading.py and documents.py: bytes as text, and text as documents."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import FRAGMENTS

from minllama.system.encodings import check_encoding
from minllama.system.errors import UsageError
from minllama.text import labelled as labelled_module
from minllama.text import reading as text_module
from minllama.text.documents import (
    first_words,
    from_a_beginning,
    read_documents,
    seen_separator,
)
from minllama.text.find_files import find_text_files
from minllama.text.labelled import is_labelled, split_labelled
from minllama.text.reading import Reading, encoding_line, read_blocks, read_lines

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


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize("name", ["a\nforged.txt", "a\rforged.txt", "a\nb/c.txt"])
def test_a_line_break_in_the_name_of_a_file_is_refused(name: str, tmp_path: Path) -> None:
    """It was printed as it was, and forged lines of the program's own."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    for pattern in (tmp_path, tmp_path / name, tmp_path / name.replace("a", "*")):
        with pytest.raises(UsageError, match="'.*a.[nr].*' has a line break in its name"):
            find_text_files([pattern])


def test_hidden_files_of_a_folder_are_left_out(tmp_path: Path, capsys) -> None:
    """Near copies in .ipynb_checkpoints made validation perplexity 36 of 215, and a Mac's ._a.txt,
    which is no text, ended the run. Only what is inside the folder counts: it may be hidden."""
    folder = tmp_path / ".cache" / "texts"
    hidden = [".git/a.txt", ".ipynb_checkpoints/b-checkpoint.txt", "sub/._b.txt", ".config"]
    for name in ["b.txt", "sub/c.txt", *hidden]:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("x", encoding="utf-8")
    found = [path.relative_to(folder).as_posix() for path in find_text_files([folder])]
    assert found == ["b.txt", "sub/c.txt"]
    told = capsys.readouterr().out
    assert "3 hidden text files left out (._b.txt, .git, .ipynb_checkpoints); what is named" in told
    assert find_text_files([folder / ".git"]) == [folder / ".git" / "a.txt"]
    assert find_text_files([folder / hidden[2]]) == [folder / hidden[2]]
    for name in ("b.txt", "sub/c.txt"):
        (folder / name).unlink()
    with pytest.raises(UsageError, match="the folder holds no .txt"):
        find_text_files([folder])


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
    with pytest.raises(UsageError, match="--pretrain_data .*holds no .txt.* file$"):
        find_text_files([tmp_path / "empty"])
    (tmp_path / "empty" / "data00.json").touch()
    with pytest.raises(UsageError, match=r"name what else to read, as in '.*empty.\*\.json'$"):
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
    """BOM off, CRLF and CR to LF, blank documents left out; .gz the same."""
    text = written(tmp_path / f"a.txt{suffix}", b"\xef\xbb\xbfone\r\ntwo\r \r\n\n \n\x00three")
    assert documents(text) == ["one\ntwo\n \n\n \n\x00three"]
    assert documents(text, document_per_line=True) == ["one", "two", "\x00three"]
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
        ("a.jsonl", b"[1]", "a.jsonl:1: not a JSON object"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1: half a surrogate"),
    ],
)
def test_bad_text(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    """Each is one line that names file and line."""
    with pytest.raises(UsageError, match=words):
        documents(written(tmp_path / name, data))


def test_cr_alone_is_a_line_end(tmp_path: Path) -> None:
    """README says any line ends: 200 lines of an old Mac's were one document."""
    text = "\r".join(f"line {number}" for number in range(200))
    path = written(tmp_path / "a.txt", text.encode())
    assert documents(path, document_per_line=True) == text.split("\r")
    assert [number for number, _ in read_lines(path)] == list(range(1, 201))
    labelled = written(tmp_path / "l.txt", text.replace("line", "1 ||| line").encode())
    assert is_labelled(labelled) and len(documents(labelled, sentences_only=True)) == 200
    path = written(tmp_path / "a.jsonl", b'{"text": "a\\rb"}\r{"text": "c"}\r')
    assert documents(path) == ["a\nb", "c"]
    with pytest.raises(UsageError, match=r"b\.txt:3: byte 0xff"):
        documents(written(tmp_path / "b.txt", b"one\r\ntwo\r\xff"))
    with pytest.raises(UsageError, match=r"u\.txt:3: byte"):
        data = "one\r\ntwo\r".encode("utf-16-le") + b"\x00\xdc"
        documents(written(tmp_path / "u.txt", data), encoding="utf-16-le")


def test_joined_files_have_no_bom_inside(tmp_path: Path) -> None:
    """Of two joined, the second one's BOM was text; in a .jsonl file it ended the run."""
    one, two = "\ufeffone\n".encode(), "\ufefftwo\n".encode()
    assert documents(written(tmp_path / "a.txt", one + two)) == ["one\ntwo\n"]
    path = written(tmp_path / "a.jsonl", 2 * '\ufeff{"text": "x"}\n'.encode())
    assert documents(path) == ["x", "x"]


@pytest.mark.parametrize(
    ("separator", "text", "expected"),
    [
        ("<|end|>", "A.\n B.\n\n<|end|>\n\nC.<|end|>D.\n", ["A.\n B.", "C.", "D."]),
        ("<|endoftext|>", "<|endoftext|>\n<|endoftext|> \nA\n\n\nB", ["A\n\n\nB"]),
        ("blank line", "\n\n  A\n B\r\n \t\n\n\nC\n\n", ["  A\n B", "C"]),
        ("---", "A --- B\n---\nC\n-----\nD", ["A --- B", "C\n-----\nD"]),
        ("%", "One.\n%\n50% of all.\n", ["One.", "50% of all."]),
        ("===", " \n===\n", []),
    ],
)
def test_documents_between_separators(
    tmp_path: Path, monkeypatch, separator: str, text: str, expected: list[str]
) -> None:
    """200 stories with nanoGPT's separator between them were one document, and it was spelt."""
    path = written(tmp_path / "a.txt", text.encode())
    assert documents(path, document_separator=separator) == expected
    monkeypatch.setattr(text_module, "READ_BYTES", 3)
    assert documents(path, document_separator=separator) == expected


def test_separators_that_contradict(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--document_separator '': name a text, or 'blank line'"):
        Reading(document_separator=" ")
    with pytest.raises(UsageError, match="--document_per_line both say where documents end"):
        Reading(document_separator="---", document_per_line=True)


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("A story.\n<|endoftext|>\n" * 5, "<|endoftext|>"),
        ("A story.</s>" * 5, "</s>"),
        ("A story.\n---\n" * 5, "---"),
        ("A poem,\nof lines.\n\n" * 20, "blank line"),
        ("A story.\n" * 50, None),
        ("A story.\n\n" * 4, None),
        ("", None),
    ],
)
def test_a_separator_is_seen(text: str, mark: str | None) -> None:
    assert seen_separator(text) == mark


def test_json_as_people_have_it(tmp_path: Path, capsys) -> None:
    """An object over several lines, a list in an object, a list of strings, turns, null: an error
    that contradicted itself ("no field 'text' (has: id, text)") or told nothing."""

    def texts(data: str, **options: object) -> list[str]:
        return documents(written(tmp_path / "a.json", data.encode()), **options)

    assert texts('{"id": 1, "text": null}\n{"text": "x"}\n{"text": null}') == ["x"]
    assert "a.json: 2 of its documents empty: null in 'text'" in capsys.readouterr().out
    assert texts('{\n "text": "a"\n}\n{"text":\n"b"}') == ["a", "b"]
    assert texts('["a", "b\\r\\nc"]') == ["a", "b\nc"]
    data = '{"data": [{"text": "a"}, {"text": "b"}], "version": 1}'
    with pytest.raises(UsageError, match=r"a\.json:1: no field .*--text_field data\.text reads"):
        texts(data)
    assert texts(data, text_field="data.text") == ["a", "b"]
    chat = '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}'
    with pytest.raises(UsageError, match=r"--option finetune --train .*a\.json trains on it; --te"):
        texts(chat)
    assert texts(chat, text_field="conversations") == ["Hi\nYo"]
    with pytest.raises(UsageError, match=r"a\.json:1: no field 'text' .has: id., and no other has"):
        texts('{"id": 5}')
    with pytest.raises(UsageError) as raised:  # once a name was printed whole, with its lines
        texts(json.dumps({"a" * 10**6: 1, "b\n\ud800": [{"x\n" * 10**6: "y"}]}))
    assert len(str(raised.value)) < 400 and str(raised.value).isprintable()


def test_replaced_bytes(tmp_path: Path) -> None:
    """--encoding_errors replace has U+FFFD where strict reading would end."""
    text = written(tmp_path / "a.txt", b"one \xff two")
    assert documents(text, encoding_errors="replace") == ["one \ufffd two"]
    half = written(tmp_path / "a.jsonl", b'{"text": "x\\ud800y"}')
    assert documents(half, encoding_errors="replace") == ["x\ufffdy"]


def test_a_line_that_is_none_is_refused(tmp_path: Path, monkeypatch) -> None:
    """Three GB of one letter are 3 MB of .gz: the error spoke of a batch that was too large."""
    monkeypatch.setattr(text_module, "LINE_CHARS", 1000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' + b"a" * 10**6))
    with pytest.raises(UsageError, match="a.jsonl.gz:2: a line of more than 1,000 characters"):
        list(read_documents(path, Reading()))
    plain = tmp_path / "a.txt"
    plain.write_text("a" * 10**6, encoding="utf-8")
    assert sum(len(block.text) for block in read_documents(plain, Reading())) == 10**6
    monkeypatch.setattr("minllama.text.documents.LINE_CHARS", 10**6 - 1)
    with pytest.raises(UsageError, match="a.txt: more than 999,999 characters without a space"):
        list(read_documents(plain, Reading()))
    plain.write_text("a" * 999_990 + "\nb " + "a" * 999_990, encoding="utf-8")
    assert len([*read_documents(plain, Reading())]) > 1


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
    if data.startswith(b"\x1f\x8b") or 4 * data.count(0) > len(data):  # taken for UTF-16
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "READ_BYTES", size)
        try:
            expected = "\n".join(data.decode("utf-8").replace("\r\n", "\n").split("\r"))
        except UnicodeDecodeError as error:
            before = error.object[: error.start].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            line = before.count(b"\n") + 1
            with pytest.raises(UsageError, match=f"decoded.txt:{line}: byte"):
                list(read_blocks(path))
            return
        expected = "\n".join(line.lstrip("\ufeff") for line in expected.split("\n"))
        assert "".join(read_blocks(path)) == expected
        lines = [line for _, line in read_lines(path)]
        assert "\n".join(lines) == expected.removesuffix("\n")


def test_a_wrong_encoding_is_told_the_likely_one_and_never_itself(tmp_path):
    """A folder of GBK read as Big5 was only asked whether that is its encoding."""
    text = ("今天天气很好。我们去公园散步吧。\n" * 20).encode("gb18030")
    with pytest.raises(
        UsageError, match=r"is not big5; it is likely gb18030 \(.+--encoding gb18030"
    ):
        documents(written(tmp_path / "g.txt", text), encoding="big5")
    broken = "Hello there\n".encode("utf-16-le") * 20 + b"\x00\xd8a\0"
    with pytest.raises(UsageError, match=r"is not utf-16-le; is that the file's --encoding\?"):
        documents(written(tmp_path / "u.txt", broken), encoding="utf-16-le")


# ---------------------------------------------------------------------------- other encodings

SAMPLES = {
    "gb18030": "从前有一座山，山里有一座庙，庙里有一个老和尚在给小和尚讲故事。\n",
    "big5": "從前有一座山，山裡有一座廟，廟裡有一個老和尚在給小和尚講故事。\n",
    "shift_jis": "むかしむかし、あるところに、おじいさんとおばあさんが住んでいました。\n",
    "euc_jp": "むかしむかし、あるところに、おじいさんとおばあさんが住んでいました。\n",
    "cp949": "옛날 옛적에 한 마을에 착한 나무꾼이 살고 있었습니다.\n",
    "cp1251": "Жили-были старик со старухой у самого синего моря.\n",
    "koi8-r": "Жили-были старик со старухой у самого синего моря.\n",
    "cp1252": "Il était une fois une fille très aimée, qui n’avait pas d'été. Voilà.\n",
    "utf-16": "从前有一座山。\n",
    "utf-16-le": "Once upon a time.\n",
    "utf-16-be": "从前有一座山。\n",
    "utf-32": "Once upon a time.\n",
}


@pytest.mark.parametrize("encoding", SAMPLES)
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_another_encoding_is_recognised_and_read(tmp_path: Path, encoding: str, errors: str):
    """GBK text was told to use --encoding_errors replace, which left nothing of it, uncounted.

    UTF-16 without a BOM is UTF-8 with zeros between the letters, and was read as that.
    """
    text = 9 * SAMPLES[encoding]
    path = written(tmp_path / "a.txt", text.encode(encoding))
    if encoding in ("utf-16", "utf-32"):  # which a BOM tells
        assert "".join(read_blocks(path, Reading(encoding_errors=errors))) == text
    else:
        with pytest.raises(UsageError, match=f"likely {encoding} .*: --encoding {encoding} ") as e:
            list(read_blocks(path, Reading(encoding_errors=errors)))
        assert text[:6] in str(e.value) or encoding == "cp1252"  # it shows how it would read
        assert "--encoding_errors" not in str(e.value)
    read = Reading(encoding=encoding, encoding_errors=errors)
    assert "".join(read_blocks(path, read)) == text
    later = written(tmp_path / "b.txt", b"Once.\n" * 50000 + text.encode(encoding))
    if not encoding.startswith("utf"):
        with pytest.raises(UsageError, match=rf"b\.txt:50001: .*is likely {encoding} "):
            list(read_blocks(later))


@pytest.mark.parametrize(
    "line",
    ["Жили-были старик.\n", "نص عربي هنا.\n", "यह हिन्दी पाठ.\n", "นี่คือ ข้อความ\n", "Γεια σου, τι\n"],
)
def test_utf_16_of_other_scripts_is_recognised(tmp_path: Path, line: str) -> None:
    """Of these hardly a tenth of the bytes are zeros: some were read as UTF-8, control characters
    and all, without a word.
    """
    path = written(tmp_path / "a.txt", (20 * line).encode("utf-16-le"))
    with pytest.raises(UsageError, match="likely utf-16-le"):
        list(read_blocks(path))


def test_zeros_are_no_text(tmp_path: Path) -> None:
    """A file that was never filled is zeros, which are UTF-8."""
    with pytest.raises(UsageError, match="is binary"):
        list(read_blocks(written(tmp_path / "a.txt", b"Once.\n" * 100 + bytes(9000))))


def test_each_file_is_read_in_its_own_encoding(tmp_path: Path) -> None:
    """cp1252 made mojibake of the UTF-8 files in a folder, and gb18030 refused them."""
    text = SAMPLES["gb18030"] * 20_000  # several blocks
    utf8 = written(tmp_path / "utf8.txt", text.encode())
    with_bom = written(tmp_path / "bom.txt.gz", text.encode("utf-16"))
    gbk = written(tmp_path / "gbk.txt", b"Once upon a time.\n" * 30_000 + text.encode("gb18030"))
    plain = written(tmp_path / "plain.txt", b"Once.\n")
    reading = Reading(encoding="gb18030")
    for path in (utf8, with_bom):
        assert "".join(read_blocks(path, reading)) == text
    assert "".join(read_blocks(gbk, reading)).endswith(text)
    assert encoding_line([gbk, plain], reading) is None
    assert encoding_line([utf8, plain], Reading()) is None
    assert encoding_line([utf8, gbk, plain, with_bom], reading) == (
        f"encodings    1 as utf-8 ({utf8}), 2 as gb18030 ({gbk}, {plain}), 1 as utf-16 "
        f"({with_bom}): by BOM, else UTF-8, else --encoding"
    )
    utf16 = written(tmp_path / "u.txt", "Once upon a time.\n".encode("utf-16-le"))  # valid UTF-8
    assert "".join(read_blocks(utf16, Reading(encoding="utf-16-le"))) == "Once upon a time.\n"
    iso = written(tmp_path / "i.txt", "むかし\n".encode("iso2022_jp"))  # likewise
    assert "".join(read_blocks(iso, Reading(encoding="iso2022_jp"))) == "むかし\n"
    cut = written(tmp_path / "c.txt", text.encode()[:-2])
    with pytest.raises(UsageError, match=r"c\.txt:\d+: byte 0x\w\w is not gb18030|c.txt: not"):
        list(read_blocks(cut, reading))


def test_what_is_replaced_is_counted(tmp_path: Path, capsys) -> None:
    """Nobody knew how much of a text was lost; a spot that is damaged is no other encoding."""
    text = (9 * SAMPLES["gb18030"]).encode()
    path = written(tmp_path / "a.txt", text[:400] + b"\xff\xff" + text[400:])
    with pytest.raises(UsageError, match=r"a\.txt:5: .* or --encoding_errors replace"):
        list(read_blocks(path))
    found = "".join(read_blocks(path, Reading(encoding_errors="replace")))
    count = found.count("\ufffd")
    assert count and f"a.txt: U+FFFD stands for what is not utf-8, {count} times" in (
        capsys.readouterr().out
    )
    written(path, ("\ufffd" * 3).encode() + text)  # which the text has of its own
    assert "".join(read_blocks(path, Reading(encoding_errors="replace"))).count("\ufffd") == 3
    assert not capsys.readouterr().out


def test_what_is_no_text_is_no_encoding(tmp_path: Path) -> None:
    """Random bytes are not taken for Russian or Korean; the remedy is not to replace them."""
    path = written(tmp_path / "a.txt", random.Random(0).randbytes(20000))
    for errors in ("strict", "replace"):
        with pytest.raises(UsageError, match="is binary, of an unknown kind") as raised:
            list(read_blocks(path, Reading(encoding_errors=errors)))
        assert not re.search("likely|replace|--encoding", str(raised.value))
    for encoding in ("gb18030", "latin-1"):
        with pytest.raises(UsageError, match="a.txt: is binary, of an unknown kind"):
            list(read_blocks(path, Reading(encoding=encoding)))


@pytest.mark.parametrize("name", ["klingon", "hex", "rot13", "base64", ""])
def test_an_encoding_that_is_none_is_refused(name: str) -> None:
    """Before any file is opened; some of Python's codecs are not for text."""
    with pytest.raises(UsageError, match="--encoding .*: no text encoding"):
        check_encoding(name)


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

    monkeypatch.setattr(labelled_module, "read_blocks", counted)
    for start, expected in (("0 ||| ", True), ("", False)):
        path = written(tmp_path / "a.txt", f"{start}{'word ' * 2000}".encode())
        assert is_labelled(path) == expected and read == [100]
        read.clear()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("One day,\n a little fox went far away", "One day, a little"),
        ("从前有一只小狐狸，它住在山里的一间小屋里。", "从前有一只小狐狸"),
        ("Hello world", "Hello"),
        (" \n ", ""),
    ],
)
def test_the_first_words_of_a_text_leave_something_to_continue(text, words):
    """Prompts once were English, whatever the text; Chinese has no spaces to count words by."""
    assert first_words(text) == words


@pytest.mark.parametrize(
    ("text", "markers", "words"),
    [
        ("从前<|im_end|>有一只小狐狸，它住在山里。", [], "从前"),
        ("<|im_start|>从前有一只小狐狸，它住在山里。", [], "<|im_start|>"),
        ("从前有一<人名标记>只小狐狸，它住在山里的屋。", ["<人名标记>"], "从前有一"),
        ("One day <|im_end|> a little fox went away", [], "One day <|im_end|> a"),
    ],
)
def test_the_first_words_end_outside_of_a_marker(text, markers, words):
    """A sample's prompt ended in `<|im_s`, which a model then had to go on from."""
    assert first_words(text, markers) == words


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        (
            "be commanded Under Cominius.\n\nMARCIUS:\nSir, praise me not; my work has warmed me.",
            "MARCIUS:\nSir, praise me not; my work has warmed me.",
        ),
        ("his side.) Then he went up the hill to see it.", "Then he went up the hill to see it."),
        ("的话。”宝玉听了，便走到里间屋里去看她一看。", "宝玉听了，便走到里间屋里去看她一看。"),
        ("of it\nand so the day went on until the night", "and so the day went on until the night"),
        (
            "a long way to go from here to there. So it",
            "a long way to go from here to there. So it",
        ),
        ("一只小狐狸，它住在山里的一间小屋。", "一只小狐狸，它住在山里的一间小屋。"),
    ],
)
def test_a_prompt_out_of_a_long_text_begins_with_a_sentence(text, rest):
    """It was `be commanded Under Cominius.`, a sentence's end, which no prompt is like."""
    assert from_a_beginning(text) == rest


def test_labels_that_are_words_are_left_out_too(tmp_path: Path) -> None:
    """`--sentences_only` knew numbers alone, and trained on the labels of everyone else."""
    path = written(tmp_path / "a.txt", b"neg ||| a bad film\npos ||| a good one\n")
    assert documents(path, sentences_only=True) == ["a bad film", "a good one"]


@pytest.mark.parametrize("magic", [b"PK\x03\x04 ", b"%PDF-1.7", b"\x89PNG\r\n"])
def test_what_is_no_text_is_named(magic: bytes, tmp_path: Path) -> None:
    """A .docx was "likely cp1252", and with that encoding its bytes were trained on."""
    path = written(tmp_path / "a.docx", magic + bytes(100))
    for encoding in ("utf-8", "cp1252"):
        with pytest.raises(UsageError, match=r"a.docx: is an? .*, no text"):
            documents(path, encoding=encoding)


def test_a_folder_that_a_glob_matches_is_told(tmp_path: Path, capsys) -> None:
    """Half of the text was left out without a word."""
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "sub/b.txt"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    assert find_text_files([str(tmp_path / "*")]) == [tmp_path / "a.txt"]
    assert "1 folder left out" in capsys.readouterr().out
