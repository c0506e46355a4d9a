"""Vocabularies of every kind that is trained here, in the formats of other programs.

Their ids are compared with transformers' and llama.cpp's own, and with those after the way back.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from llama_cpp_server import llama_cpp, their_ids
from oracles import make_model, write
from vocabularies import FRAGMENTS, corpus_lines

from llama import load_pretrained
from minllama.vocabulary.sentence_piece import SPACE
from tokenizer import Tokenizer, train_vocabulary

# Tags look like control tokens, but llama.cpp knows none of these names.
TAGS = ["<tag>", "<|user|>", "<bos>", "[SEP]", "<pad>", "<|im_start|>", "<0x4>"]
SYMBOLS = ["e2-e4", "O-O", "the cat", *TAGS, "♞f3", "🙂", "你好", "A", '"q"', "a,b"]
CASES = {
    "sentencepiece": {"symbols": SYMBOLS},
    "byte-bpe": {"kind": "byte-bpe"},
    "byte-bpe with symbols": {"kind": "byte-bpe", "symbols": SYMBOLS},
    "chars": {"vocab_size": "chars"},
    "chars with symbols": {"vocab_size": "chars", "symbols": SYMBOLS},
}


def texts() -> list[str]:
    """Symbols alone, side by side, between words and beside spaces, and other texts."""
    pick = random.Random(2)
    pieces = [*SYMBOLS * 2, *FRAGMENTS, "e2", "O", "-", "a", "<s>", "<|end_of_text|>", "12"]
    mixed = ["".join(pick.choices(pieces, k=pick.randint(1, 25))) for _ in range(150)]
    return [t.replace(SPACE, "") for t in [*SYMBOLS, " e2-e4", *mixed, *corpus_lines()[:20]]]


@pytest.fixture(params=CASES)
def tokenizer(request, tmp_path: Path) -> Tokenizer:
    """One of each case, trained on a text in which its symbols stand."""
    if "byte-bpe" in request.param:
        pytest.importorskip("tokenizers")
    pick, path = random.Random(4), tmp_path / "text.txt"
    lines = [f"{line}{pick.choice(SYMBOLS)}{line[:20]}" for line in corpus_lines()]
    path.write_text("\n".join(lines), encoding="utf-8")
    train_vocabulary([path], tmp_path / "vocabulary", **CASES[request.param])
    return Tokenizer(tokenizer_model=tmp_path / "vocabulary")


def assert_same(path: Path, tokenizer: Tokenizer) -> None:
    """What is read back has the same ids of all texts, and the same symbols."""
    back = Tokenizer(tokenizer_model=load_pretrained(path).vocabulary)
    assert back.vocabulary.added_tokens == tokenizer.vocabulary.added_tokens
    for text in texts():
        ids = tokenizer.encode(text, True, True)
        assert back.encode(text, True, True) == ids and back.decode(ids) == text


def test_transformers_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of SentencePiece with a space before each text it put one behind every symbol, too."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    write(make_model(tokenizer, max_seq_len=1000), "hf", tmp_path / "hf", tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in texts():
        ids = tokenizer.encode(text, True, False)
        assert theirs.encode(text) == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert_same(tmp_path / "hf", tokenizer)
    (tmp_path / "hf" / "tokenizer.model").unlink(missing_ok=True)  # as their save leaves none
    assert_same(tmp_path / "hf", tokenizer)


def test_llama_cpp_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path, capsys) -> None:
    """And the same text; the file says which tokens are symbols."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "a.gguf"
    write(make_model(tokenizer), "gguf", path, tokenizer=tokenizer)
    kinds = gguf.GGUFReader(path).fields["tokenizer.ggml.token_type"].contents()
    defined = [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.USER_DEFINED]
    assert defined == sorted(tokenizer.vocabulary.added_tokens.values())
    assert "overlap" not in capsys.readouterr().err
    assert_same(path, tokenizer)
    with llama_cpp(path) as ask:
        for text in filter(None, texts()):
            ids = tokenizer.encode(text, True, False)
            assert their_ids(ask, text) == ids, text
            assert ask("detokenize", tokens=ids[1:])["content"] == text


def test_symbols_that_overlap_are_told(tmp_path: Path, capsys) -> None:
    """llama.cpp looks for the longest in the whole text first, and not from the left."""
    pytest.importorskip("gguf")
    (tmp_path / "a.txt").write_text("ACG CGTT " * 50, encoding="utf-8")
    train_vocabulary([tmp_path / "a.txt"], tmp_path / "a", symbols=["ACG", "CGTT"])
    tokenizer = Tokenizer(tokenizer_model=tmp_path / "a")
    write(make_model(tokenizer), "gguf", tmp_path / "a.gguf", tokenizer=tokenizer)
    assert (
        "where the symbols 'ACG' and 'CGTT' overlap" in capsys.readouterr().err
    )  # stdout may be --json
    with llama_cpp(tmp_path / "a.gguf") as ask:
        apart, joined = "ACG CGTT", "ACGTT"
        assert their_ids(ask, apart) == tokenizer.encode(apart, True, False)
        assert their_ids(ask, joined) != tokenizer.encode(joined, True, False)
