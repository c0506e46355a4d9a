"""Own symbols: the file that names them, and each one token wherever it stands, for both kinds."""

from __future__ import annotations

import functools
import itertools
import random
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import FRAGMENTS, corpus_lines

from minllama.system.errors import UsageError
from minllama.text.documents import Block
from minllama.text.encoder import DocumentEncoder
from minllama.vocabulary.sentence_piece import SPACE
from minllama.vocabulary.symbols import LONGEST, find_overlap, read_symbols
from tokenizer import Tokenizer, train_vocabulary

KINDS = ["sentencepiece", "byte-bpe"]
SYMBOLS = [
    *("e2e4", "e2", "4e", "O-O", "O-O-O", "the cat", "cat sat", "A", "<tag>", "</tag>", '"q"'),
    *("a,b", "♞f3", "🙂", "你好", "on  a", "👩‍👩‍👧", "(x|y)*", "\\n"),
]
PIECES = [*SYMBOLS, *FRAGMENTS, "e", "2", "4", "O", "-", "cat", "sat", "<", "a,", "👩", "你"]


@functools.cache
def with_symbols(kind: str, *symbols: str) -> Tokenizer:
    """A vocabulary of a kind that has these symbols, of a text that has them, too."""
    if kind == "byte-bpe":
        pytest.importorskip("tokenizers")
    pick = random.Random(5)
    lines = [line + pick.choice(symbols) + line[:30] for line in corpus_lines()]
    with tempfile.TemporaryDirectory() as folder:
        text, output = Path(folder) / "text.txt", Path(folder) / "vocabulary"
        text.write_text("\n".join(lines), encoding="utf-8")
        train_vocabulary([text], output, kind=kind, symbols=symbols)
        return Tokenizer(tokenizer_model=output)


def by_regular_expression(text: str) -> list[str]:
    """The symbols in a text, from the left, of several at one place the longest."""
    return re.findall("|".join(map(re.escape, sorted(SYMBOLS, key=len, reverse=True))), text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=2), max_size=30).map("".join))
def test_each_is_one_token_wherever_it_stands(kind: str, text: str) -> None:
    """Between others, at a text's ends, inside words, with spaces of its own; nothing is lost."""
    text = text.replace(SPACE, "")
    tokenizer = with_symbols(kind, *SYMBOLS)
    ids = tokenizer.encode(text, bos=True, eos=True)
    named = {token: symbol for symbol, token in tokenizer.vocabulary.added_tokens.items()}
    assert [named[i] for i in ids if i in named] == by_regular_expression(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_byte_lengths()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symbols", [SYMBOLS, ["e2e4", "O-O"]])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    text=st.lists(st.sampled_from(PIECES), min_size=1, max_size=40).map("".join),
    part_chars=st.integers(1, 8),
)
def test_a_cut_text_has_the_ids_of_the_whole(kind, symbols, text, part_chars) -> None:
    """A document that is encoded in parts may be cut at a space, but not inside a symbol."""
    tokenizer = with_symbols(kind, *symbols)
    encoder = DocumentEncoder(tokenizer, threads=1, part_chars=part_chars, batch_chars=50)
    places = [*range(0, len(text), 3), len(text)]
    blocks = [Block(text[a:b], ends=b == len(text)) for a, b in itertools.pairwise(places)]
    parts = [part for batch in encoder.encode(blocks) for part in batch]
    assert [i for part in parts for i in part.ids.tolist()] == tokenizer.encode(text, False, False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_with_symbols_is_cut_where_they_allow_it(kind: str) -> None:
    """Symbols without spaces cost no memory: a long document is still encoded in parts."""
    assert with_symbols(kind, "e2e4", "O-O").vocabulary.cut is not None
    assert with_symbols(kind, *SYMBOLS).vocabulary.cut is None


@pytest.mark.parametrize(
    "content, problem",
    [
        ("a\n\nb", "line 2: is empty"),
        ("", "line 1: is empty"),
        ("ab\nc\nab\n", "line 3: 'ab' stands in line 1 already"),
        ("x" * (LONGEST + 1), f"line 1: '{'x' * 40}'... has 129 characters, and a symbol at most"),
        ("a\n b", "line 2: ' b' begins or ends with white space"),
        ("</s>", "line 1: '</s>' is the name of a control token"),
        ("<|end_of_text|>", "is the name of a control token"),
        ("<PAD>", "is the name of a control token"),
        ("<0x41>", "is the name of a control token"),
        ("a\tb", "holds a control character"),
        (f"a{SPACE}b", "SentencePiece's own signs"),
        (b"ab\n\xff", "not UTF-8 .byte 3."),
        ("\n".join(map(str, range(65537))), "holds 65,537 symbols, more than 65,536"),
    ],
)
def test_a_file_that_names_no_symbols(content, problem: str, tmp_path: Path) -> None:
    """One line that names the file and its line, before the text is read."""
    path = tmp_path / "symbols.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=problem) as error:
        read_symbols(path, reserved={"<0x41>"})
    assert str(error.value).startswith(f"--symbols {path}: ") and "\n" not in str(error.value)


def test_a_file_of_symbols(tmp_path: Path) -> None:
    """Its line ends and its byte order mark are no part of them."""
    path = tmp_path / "symbols.txt"
    path.write_bytes("\ufeffe2e4\r\nthe cat\r\n👩‍👩‍👧\r\n".encode())
    assert read_symbols(path) == ["e2e4", "the cat", "👩‍👩‍👧"]
    with pytest.raises(UsageError, match="--symbols .*absent: no such file"):
        read_symbols(tmp_path / "absent")


def from_the_left(text: str, symbols: list[str]) -> list[tuple[int, str]]:
    """Where SentencePiece and `tokenizers` find symbols."""
    at, places = 0, []
    while at < len(text):
        here = max((s for s in symbols if text.startswith(s, at)), key=len, default="")
        places += [(at, here)] * bool(here)
        at += len(here) or 1
    return places


def one_after_the_other(text: str, order: tuple[str, ...]) -> list[tuple[int, str]]:
    """Where llama.cpp finds them, which looks for the longest ones in the whole text first."""
    places = []
    for symbol in order:
        while (at := text.find(symbol)) >= 0:
            places.append((at, symbol))
            text = text[:at] + "\0" * len(symbol) + text[at + len(symbol) :]
    return sorted(places)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.text("ab-", min_size=1, max_size=4), min_size=1, max_size=3, unique=True),
    st.lists(st.text("ab-", max_size=12), max_size=20),
)
def test_symbols_that_are_not_said_to_overlap(symbols: list[str], texts: list[str]) -> None:
    """Both ways find the same in any text, whatever the order of those that are equally long."""
    overlap = find_overlap(symbols)
    orders = [
        order
        for order in itertools.permutations(symbols)
        if [*map(len, order)] == sorted(map(len, order), reverse=True)
    ]
    if overlap is None:
        for text in [*texts, "".join(texts)]:
            wanted = from_the_left(text, symbols)
            assert all(one_after_the_other(text, order) == wanted for order in orders)
    else:
        joints = range(1, len(overlap[0]))
        texts = [overlap[0][:at] + overlap[1] for at in joints]
        assert any(
            one_after_the_other(text, order) != from_the_left(text, symbols)
            for text in texts
            for order in orders
        )
