"""minllama/cli/chinese.py: which language it is, and a table each of whose rows a test holds."""

from __future__ import annotations

import ctypes
import io
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from hurried import hurried
from in_chinese import PLAN
from running import ROOT, SMALL, write_stories

import run_llama
from config import parse_options
from minllama.cli.chinese import (
    LABEL_COLUMNS,
    LABELS,
    LINES,
    columns_of,
    language,
    read_language,
    translate,
)
from minllama.cli.command_line import parse_or_exit, protect_output
from minllama.cli.console import say, wrapped

pytestmark = pytest.mark.usefixtures("own_folder_and_language")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "en"),
        ({"LANG": "C"}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "en_US.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_TW.UTF-8"}, "zh"),
        ({"LC_ALL": "C", "LANG": "zh_CN.UTF-8", "LC_MESSAGES": "zh_CN"}, "en"),
        ({"LC_ALL": "", "LANG": "zh_CN"}, "zh"),
    ],
)
def test_the_language_by_locale(variables, expected, monkeypatch):
    """As the C library takes it: LC_ALL, else LC_MESSAGES, else LANG; what is typed counts more."""
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert language() == expected
    for typed in ("en", "zh"):
        read_language(["--option", "generate", f"--lang={typed}"])
        assert language() == typed


@pytest.mark.parametrize(("number", "expected"), [(0x0804, "zh"), (0x0404, "zh"), (0x0409, "en")])
def test_the_language_of_windows(number, expected, monkeypatch):
    """Where no variable names one, that of its windows: Chinese, Taiwan's, English."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    kernel = types.SimpleNamespace(GetUserDefaultUILanguage=lambda: number)
    windows = types.SimpleNamespace(kernel32=kernel)
    monkeypatch.setattr(ctypes, "windll", windows, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    assert language() == expected


@pytest.mark.parametrize(
    ("encoding", "locale", "expected"),
    [
        ("utf-8", "C", "error: --foo: no such option; --help lists the options"),
        ("utf-8", "zh_CN.UTF-8", "错误：--foo：没有这个参数；--help 列出全部参数"),
        ("gbk", "zh_CN.GBK", "错误：--foo：没有这个参数；--help 列出全部参数"),
        ("cp1252", "zh_CN.UTF-8", "error: --foo: no such option; --help lists the options"),
        ("ascii", "zh_CN.UTF-8", "error: --foo: no such option; --help lists the options"),
    ],
)
def test_output_in_other_encodings(encoding, locale, expected):
    """English where the terminal's encoding has no Chinese, and never a traceback."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LC_")}
    environment |= {"LANG": locale, "PYTHONIOENCODING": encoding}
    words = [sys.executable, str(ROOT / "run_llama.py"), "--foo"]
    done = subprocess.run(words, env=environment, capture_output=True)
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.decode(encoding).splitlines() == [f"run_llama.py: {expected}"]


@pytest.mark.parametrize(("encoding", "label"), [("gbk", "词表"), ("cp1252", "vocabulary")])
def test_a_plan_in_other_encodings(encoding, label, monkeypatch):
    """The whole plan, of a text whose name the encoding may lack."""
    write_stories(Path()).rename("小说.jsonl")
    monkeypatch.setenv("LC_MESSAGES", "zh_CN.UTF-8")
    out, error = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", error)
    protect_output()
    words = [*PLAN.split(), "小说.jsonl", *SMALL]
    with hurried():
        assert run_llama.main(parse_or_exit(parse_options, "run_llama.py", words)) == 0
    out.flush()
    said = out.buffer.getvalue().decode(encoding)
    assert f"\n{label} " in said and ("小说.jsonl" if encoding == "gbk" else "??.jsonl") in said
    assert error.buffer.getvalue() == b""


# ---------------------------------------------------------------------------- the table


def test_what_is_unknown_stays_english(capsys):
    """Also where a line only begins like a label, or contains one."""
    read_language(["--lang", "zh"])
    lines = ["models       of another kind", "the text     is long", "text: no label", "no row", ""]
    assert [translate(line, sys.stdout) for line in lines] == lines
    say("warning: of an unknown kind")
    assert capsys.readouterr().out == "警告：of an unknown kind\n"


def test_paths_and_values_stay_as_they_are():
    """Whatever stands in them: braces, words of the table, of another script."""
    read_language(["--lang", "zh"])
    for name in ("{flag}", "text: no such file.txt", "files:", "文件.txt"):
        line = f"error: --train {name}: no such file"
        assert translate(line, sys.stdout) == f"错误：--train {name}：没有这个文件"


def test_rows_are_sound():
    """Each row has the holes of its English; labels leave a gap; the first row hides no later."""
    for english, chinese in LINES.items():
        holes = [set(re.findall(r"\{\w+\}", text)) for text in (english, chinese)]
        assert holes[0] >= holes[1], english
        assert chinese.encode("gbk")  # that of Chinese Windows
    assert len(LABELS) + len(LINES) <= 150
    assert all(columns_of(label) <= LABEL_COLUMNS - 2 for label in LABELS.values())


def test_hostile_lines_take_no_time():
    """An error may quote a file's line; each hole ends where its literal first comes."""
    read_language(["--lang", "zh"])
    for text in (": ", "; ", " (", ": no such file", "{where}", " has no ", " tokens, "):
        start = time.perf_counter()
        translate("error: " + text * 5000 + "x", sys.stdout)
        assert time.perf_counter() - start < 1


def test_lines_wrap_by_columns():
    """A Chinese character takes two; lines break after its punctuation and not in a path."""
    text = "警告：" + "内存不足，请减小批大小，" * 6 + "--save_dir 我的，模型/很长的名字 结束"
    shown = wrapped(text, 40)
    assert all(columns_of(line) <= 40 for line in shown.splitlines())
    assert shown.count("\n") > 4 and "\n  " in shown and "\0" not in shown and "\1" not in shown
    assert re.sub("\n *", "", shown).replace(" ", "") == text.replace(" ", "")
    plan = wrapped("学习率       up to 0.01, then cosine to 0; muon from scratch, weight decay", 60)
    assert plan.splitlines()[1].startswith(" " * LABEL_COLUMNS + "scratch")


def test_every_row_is_held_by_a_test():
    """Its Chinese stands in one of the tests."""
    files = Path(__file__).parent.glob("test_chinese*.py")
    tests = "".join(file.read_text(encoding="utf-8") for file in files)
    tests = re.sub(r'"\n\s+(?:rf|r|f)?"', "", tests)  # literals in several lines
    for chinese in [*LABELS.values(), *LINES.values()]:
        for part in re.split(r"\{\w+\}", chinese):
            assert part in tests, chinese
