"""What the command lines share: numbers, flags from a table, errors of one line each."""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from minllama.cli.command_line import (
    ROOT,
    OneLineParser,
    add_flag,
    flags_of,
    for_drawing,
    number_reader,
    own_script,
    parse_or_exit,
    print_error,
    protect_output,
    quoted,
    read_stored,
    section,
    with_underscores,
)
from minllama.system.errors import UsageError


@dataclass
class Table:
    """A flag of each kind."""

    flag = section("things", "one", "two")
    count: int = flag(3, "a number", at_least=1, below=10)
    rate: float | None = flag(None, "another", above=0, below=1)
    kind: Literal["a", "b"] = flag("a", "a choice", alone="b")
    files: tuple[str, ...] = flag((), "several", many=True)
    texts: tuple[str, ...] = flag((), "repeated", metavar="TEXT")
    note: str | None = flag(None, "words")
    flag = section("things", "two", on_resume="typed")
    folder: Path = flag(Path("x"), "a place")
    loud: bool = flag(False, "a switch")
    del flag


FIELDS = flags_of(Table)


def parse(*words: str) -> argparse.Namespace:
    parser = OneLineParser(prog="table")
    for field in FIELDS.values():
        add_flag(parser, field)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("word", "want"),
    [
        ("--save-dir", "--save_dir"),
        ("--save-dir=my-run", "--save_dir=my-run"),
        ("--pretrained-model_path", "--pretrained_model_path"),
        ("my-file", "my-file"),
        ("-h", "-h"),
        ("--", "--"),
        ("a--b-c", "a--b-c"),
    ],
)
def test_underscores_and_hyphens_are_one(word, want):
    """In a flag's name; a value's hyphens stay."""
    assert with_underscores(word) == want


@pytest.mark.parametrize(
    ("kind", "bounds", "text", "want"),
    [
        (int, {}, "12", 12),
        (int, {"at_least": 0}, "0", 0),
        (float, {"above": 0}, "1e-5", 1e-5),
        (float, {"below": 1}, "0.99", 0.99),
        (int, {}, "1.5", "not a whole number"),
        (int, {}, "6--epochs", "a space is missing before --epochs"),
        (float, {}, "x", "not a number"),
        (float, {}, "nan", "not a number"),
        (float, {}, "inf", "not a number"),
        (int, {"at_least": 1}, "0", "0 must be at least 1"),
        (float, {"above": 0}, "0", "0 must be above 0"),
        (float, {"below": 1}, "1", "1 must be below 1"),
    ],
)
def test_numbers_are_read_within_their_bounds(kind, bounds, text, want):
    """The message has what was typed and what would do."""
    read = number_reader(kind, **bounds)
    if isinstance(want, str):
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(want)):
            read(text)
    else:
        assert read(text) == want


def test_flags_of_every_kind():
    """Defaults, values, several at once, repeated, and a choice that stands alone."""
    plain = parse()
    assert (plain.count, plain.rate, plain.kind, plain.folder) == (3, None, "a", Path("x"))
    assert (plain.files, plain.texts, plain.note, plain.loud) == (None, None, None, False)
    typed = parse(
        *"--count 4 --rate 0.5 --kind --files a b --texts x --texts y --folder z --loud".split()
    )
    assert (typed.count, typed.rate, typed.kind, typed.folder) == (4, 0.5, "b", Path("z"))
    assert (typed.files, typed.texts, typed.loud) == (["a", "b"], ["x", "y"], True)
    metadata = FIELDS["folder"].metadata
    assert (metadata["section"], metadata["on_resume"], metadata["read_by"]) == (
        "things", "typed", ("two",),
    )  # fmt: skip
    metadata = FIELDS["count"].metadata
    assert (metadata["on_resume"], metadata["read_by"]) == ("stored", ("one", "two"))


@pytest.mark.parametrize("words", ["--count 10", "--kind c", "--rate", "--nothing"])
def test_a_bad_flag_is_an_error_without_usage(words, capsys):
    """argparse prints its usage above the message, which hides it."""
    with pytest.raises(UsageError) as raised:
        parse(*words.split())
    assert words.split()[0] in str(raised.value)
    assert not str(raised.value).startswith("argument") and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "stored", "want"),
    [
        ("count", 4, 4),
        ("rate", 0.25, 0.25),
        ("rate", None, None),
        ("kind", "b", "b"),
        ("files", ["a", "b"], ("a", "b")),
        ("folder", "a/b", Path("a/b")),
        ("note", None, None),
        ("loud", True, True),
    ],
)
def test_a_stored_value_is_what_the_flag_had(name, stored, want):
    """As JSON and checkpoints hold it."""
    value = read_stored(FIELDS[name], stored)
    assert value == want and type(value) is type(want)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("count", 0), ("count", 10), ("count", 2.5), ("count", True), ("count", "4"),
        ("count", None), ("rate", 7.0), ("rate", float("nan")), ("kind", "c"), ("kind", ["a"]),
        ("files", "a"), ("files", [1]), ("files", ["\0"]), ("folder", 3), ("folder", "\0"),
        ("folder", ""), ("note", "\0"), ("note", "\ud800"),
        ("files", ["\ud800"]), ("note", 3), ("loud", 1), ("loud", "yes"),
    ],
)  # fmt: skip
def test_a_stored_value_that_the_flag_could_not_have(name, stored):
    """A damaged or made-up checkpoint must not bring in what the command line refuses."""
    with pytest.raises(UsageError, match=f"the checkpoint's --{name} is .*: it is damaged"):
        read_stored(FIELDS[name], stored)


def test_types_without_none():
    """Of a flag that may be left out its value's."""
    types = {name: field.type for name, field in FIELDS.items()}
    assert types["rate"] is float and types["note"] is str and types["folder"] is Path
    assert types["kind"] == Literal["a", "b"] and types["files"] == tuple[str, ...]


def test_each_problem_is_a_line_with_the_programs_name(capsys):
    """On stderr, where a log of the output does not hide it."""
    print_error("x.py", UsageError("one\ntwo"))
    captured = capsys.readouterr()
    assert captured.err == "x.py: error: one\nx.py: error: two\n" and not captured.out


@pytest.mark.parametrize(("world", "rank", "said"), [("1", "0", 1), ("4", "0", 1), ("4", "2", 0)])
def test_of_several_processes_one_says_what_is_wrong(world, rank, said, monkeypatch, capsys):
    """All have the same command line; each ends with exit status 2."""
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("RANK", rank)

    def refuse(words):
        raise UsageError(f"{words[0]}: no such option")

    with pytest.raises(SystemExit) as ended:
        parse_or_exit(refuse, "x.py", ["--y"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("x.py: error: --y: no such option\n") == said
    assert parse_or_exit(len, "x.py", ["a", "b"]) == 2


def test_a_command_can_be_pasted():
    """Also with spaces and quotes in it."""
    words = ["python", Path("my model.pt"), "it's", "--plain"]
    text = quoted(*words)
    if os.name == "nt":
        assert text == 'python "my model.pt" it\'s --plain'
    else:
        assert shlex.split(text) == [str(word) for word in words]


def test_control_characters_are_shown_and_not_obeyed(capsys, monkeypatch):
    """A file's name with an escape sequence in it changed the terminal that it was printed on."""
    print_error("p", UsageError("--dev \x1b]0;a\x07: no such file\nand another"))
    assert capsys.readouterr().err == (
        "p: error: --dev \\x1b]0;a\\x07: no such file\np: error: and another\n"
    )
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    protect_output()
    print("a\x1b[31mb\tc\x9b")
    sys.stdout.flush()
    assert stream.buffer.getvalue() == b"a\\x1b[31mb\tc\\x9b\n"


def test_what_is_printed_rewrites_no_line(monkeypatch):
    """A label, or a word of a stranger's run.json, went back over lines by `\\r` and `\\x1b[A`.

    They were let through for progress bars, which have a stream of their own now.
    """
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", stream)
    protect_output()
    print("good\x1b[A\rdev accuracy 1.000", file=sys.stderr)
    drawing = for_drawing(sys.stderr)
    drawing.write("\r50%\x1b[A")
    sys.stderr.flush()
    shown = stream.buffer.getvalue()
    assert shown == b"good\\x1b[A\\rdev accuracy 1.000\n\r50%\x1b[A"
    assert drawing == sys.stderr  # to tqdm, which clears a bar before it writes to its stream
    assert for_drawing(stream) is stream


def test_a_name_that_is_not_utf8_is_shown_by_its_bytes(capsys):
    """Of a zip with GBK names each file was `????.txt`, in commands to be pasted, too."""
    name = b"\xb2\xe2\xca\xd4.txt".decode("utf-8", "surrogateescape")
    print_error("p", f"{name}: is empty \ud800")
    assert capsys.readouterr().err == "p: error: \\xb2\\xe2\\xca\\xd4.txt: is empty \\ud800\n"


@pytest.mark.skipif(shutil.which("bash") is None or os.name == "nt", reason="of Unix' shells")
@pytest.mark.parametrize(
    "word",
    [
        b"\xb2\xe2\xca\xd4.txt",
        b"\xb20",
        b"it's \\n $HOME\nrm x",
        b"a\x1b[A\rb",
        "ü\u3000\u202e\u009b".encode(),
    ],
)
def test_a_pasted_command_has_the_same_words(word):
    """`\\r` and an escape sequence hid the rest of a command; bytes came back as question marks."""
    text = quoted("printf", "%s", word.decode("utf-8", "surrogateescape"))
    assert text.isprintable()
    assert subprocess.run(["bash", "-c", text], capture_output=True, check=True).stdout == word


def test_an_endless_word_is_not_printed_whole(capsys):
    """A .jsonl key of 100 MB was, and the remedy lay behind it."""
    print_error("p", "no field 'text' (has: " + "k" * 10**6 + "); name it with --text_field")
    printed = capsys.readouterr().err
    assert len(printed) < 2100 and "998,0" in printed and printed.count("\n") == 1
    assert printed.startswith("p: error: no field") and printed.endswith("--text_field\n")


@pytest.mark.parametrize("flag", ["--note", "--folder", "--files", "--texts", "--kind"])
def test_two_hyphens_are_no_value(flag):
    """argparse made an empty list of `--save_dir=--`, and a traceback followed."""
    with pytest.raises(UsageError, match=f"{flag}=--: -- is no value; a path of that name is ./--"):
        parse(f"{flag}=--")


@pytest.mark.parametrize(
    ("flag", "value", "want"),
    [
        ("--folder", "a\0b", r"--folder: 'a\x00b' holds a NUL"),
        ("--folder", "a\ud800", r"--folder: 'a\ud800' holds a NUL or half a character"),
        ("--folder", "", "--folder: '' is no path"),
        ("--folder", "a/" * 3000, "a/'...: is too long for a path"),
        ("--folder", "x/" + "a" * 256, "a'...: is too long for a path"),
        ("--files", "a\0b", r"--files: 'a\x00b' holds a NUL"),
        ("--texts", "a\0b", r"--texts: 'a\x00b' holds a NUL"),
        ("--note", "a\0b", r"--note: 'a\x00b' holds a NUL"),
    ],
)
def test_what_no_path_can_be_is_refused_as_it_is_read(flag, value, want):
    """A NUL, which TOML can write, was a traceback at the first use of the path."""
    with pytest.raises(UsageError, match=re.escape(want)):
        parse(flag, value)


@pytest.mark.parametrize(
    ("running", "here", "named"),
    [
        ("run_llama.py", True, "tokenizer.py"),
        ("../repo/check_model_precision.py", False, "../repo/tokenizer.py"),
        ("api.py", True, "tokenizer.py"),
        ("/x/ipykernel_launcher.py", False, str(ROOT / "tokenizer.py")),
        ("", False, str(ROOT / "tokenizer.py")),
    ],
)
def test_a_command_to_type_begins_with_a_script_of_this_program(
    running, here, named, monkeypatch, tmp_path
):
    """Trained from Python, a run said `python api.py --option generate`: the user's own script."""
    monkeypatch.setattr(sys, "argv", [running, "--option", "pretrain"])
    monkeypatch.chdir(ROOT if here else tmp_path)
    assert own_script("tokenizer.py") == Path(named)
