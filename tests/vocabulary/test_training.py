"""Training a vocabulary: byte-level BPE, and a token for every character."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from vocabularies import corpus_lines

import minllama.vocabulary.training as training
from minllama.system.errors import Interrupted, UsageError
from minllama.vocabulary.byte_bpe import ByteBPE
from minllama.vocabulary.training import BOS, EOS
from tokenizer import Tokenizer, main, tokenizer_bin, train_vocabulary

ROOT = Path(__file__).resolve().parents[2]
ODD = ["", " ", "  the cat\n\n\nsat", "don't 12345 \t x", "naïve 你好 🙂\u0301", f"{BOS} {EOS} <s>"]


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(corpus_lines()), encoding="utf-8")
    return path


def train_byte_bpe(corpus: Path, output: Path, **settings) -> Tokenizer:
    pytest.importorskip("tokenizers")
    train_vocabulary([corpus], output, kind="byte-bpe", **settings)
    return Tokenizer(tokenizer_model=output)


# ---------------------------------------------------------------------------- byte-level BPE


def test_byte_bpe_is_a_tokenizer_json_that_others_read(corpus_file: Path, tmp_path: Path) -> None:
    """The ids are those of `tokenizers` and of transformers, with BOS before a text."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "my-tokenizer.json"
    tokenizer = train_byte_bpe(corpus_file, path, vocab_size=500)
    assert isinstance(tokenizer.vocabulary, ByteBPE) and tokenizer.n_words == 500
    assert tokenizer.vocabulary.pre_tokenizer == "llama-bpe" and tokenizer.vocabulary.adds_bos
    assert tokenizer.vocabulary.control_tokens == {BOS: 498, EOS: 499}
    assert (tokenizer.bos_id, tokenizer.eos_id) == (498, 499)
    tokenizers = pytest.importorskip("tokenizers")
    engine = tokenizers.Tokenizer.from_file(str(path))
    engine.encode_special_tokens = True
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    theirs.split_special_tokens = True
    for text in [*ODD, *corpus_lines()[:50]]:
        ids = tokenizer.encode(text, bos=True, eos=False)
        assert ids == engine.encode(text).ids == theirs.encode(text)
        assert tokenizer.decode(ids) == text
    # Lines were learnt with their ends, which SentencePiece never sees.
    assert len(tokenizer.encode("\n\n", False, False)) <= 2


def test_byte_bpe_merges_the_most_frequent_pair_first(tmp_path: Path) -> None:
    """By hand: of "ab" nine, of "abc" four after it; what comes once is not learnt."""
    (tmp_path / "a.txt").write_text("ab " * 5 + "abc " * 4 + "xyz", encoding="utf-8")
    with pytest.raises(UsageError, match="too large: this text gives at most (\\d+)") as error:
        train_byte_bpe(tmp_path / "a.txt", tmp_path / "a.json", vocab_size=1000)
    most = int(str(error.value).split()[-1])
    tokenizer = train_byte_bpe(tmp_path / "a.txt", tmp_path / "a.json", vocab_size=most)
    assert tokenizer.n_words == most
    assert tokenizer.vocabulary.merges[0] == ["a", "b"]
    assert {"".join(pair) for pair in tokenizer.vocabulary.merges} == {"ab", "Ġab", "Ġabc"}


def test_byte_bpe_is_the_same_in_every_process(corpus_file: Path, tmp_path: Path) -> None:
    """Rust's maps have an order of their own in each process; the file names no path, either."""
    pytest.importorskip("tokenizers")
    command = [sys.executable, str(ROOT / "tokenizer.py"), "train", "--input", str(corpus_file)]
    for name in "ab":
        output = ["--kind", "byte-bpe", "--output", str(tmp_path / f"{name}.json")]
        assert subprocess.run([*command, *output], capture_output=True).returncode == 0
    whole = (tmp_path / "a.json").read_bytes()
    assert whole == (tmp_path / "b.json").read_bytes()
    assert b"corpus" not in whole and json.loads(whole)["version"] == "1.0"


def test_byte_bpe_is_of_the_size_that_suits_the_text(tmp_path: Path) -> None:
    """As large as SentencePiece's of the same text, which leaves out the ends of lines."""
    text = ROOT / "README.md"
    train_vocabulary([text], tmp_path / "a.model")
    size = Tokenizer(tokenizer_model=tmp_path / "a.model").n_words
    assert abs(train_byte_bpe(text, tmp_path / "a.json").n_words - size) <= 64
    with pytest.raises(UsageError, match="no text"):
        (tmp_path / "b.txt").write_text("\n\n ", encoding="utf-8")
        train_byte_bpe(tmp_path / "b.txt", tmp_path / "b.json")


def test_training_byte_bpe_hears_a_request_to_stop(corpus_file, tmp_path, monkeypatch) -> None:
    """It runs in Rust, where no Ctrl-C is heard."""
    tokenizers = pytest.importorskip("tokenizers")
    endless = threading.Event()

    class Endless:
        from_str = staticmethod(lambda _: Endless())
        train_from_iterator = staticmethod(lambda **_: endless.wait())

    def check_stop() -> None:
        raise Interrupted

    monkeypatch.setattr(tokenizers, "Tokenizer", Endless)
    with pytest.raises(Interrupted):
        train_byte_bpe(corpus_file, tmp_path / "a.json", check_stop=check_stop)
    endless.set()
    assert not (tmp_path / "a.json").exists()


def test_a_symbol_is_not_learnt_as_part_of_others(tmp_path: Path) -> None:
    """Merges over the edge of a symbol could never be used, and would take the place of others."""
    text = "go e2e4 on " * 50 + "xe2e4y" * 50
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    tokenizer = train_byte_bpe(tmp_path / "a.txt", tmp_path / "a.json", symbols=["e2e4"])
    merged = {"".join(pair) for pair in tokenizer.vocabulary.merges}
    assert {"yx", "Ġon"} <= merged <= {"yx", "Ġon", "on", "go", "Ġgo"}
    assert tokenizer.vocabulary.added_tokens["e2e4"] == 256 + len(merged)


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"vocab_size": 257}, "--vocab_size 257: too small: at least 258"),
        ({"vocab_size": 258, "symbols": ["ab", "A"]}, "--vocab_size 258: too small: at least 259"),
        ({"vocab_size": "chars"}, "--vocab_size chars: --kind byte-bpe knows bytes"),
        ({"character_coverage": 0.99}, "--character_coverage: --kind byte-bpe covers all"),
        ({"symbols": ["é"]}, "--symbols: 'é' is what byte-level BPE calls the byte 233"),
    ],
)
def test_what_byte_bpe_cannot_be(settings: dict, problem: str, tmp_path: Path) -> None:
    """It is said before the text is read, which is not there."""
    with pytest.raises(UsageError, match=problem):
        train_byte_bpe(tmp_path / "absent.txt", tmp_path / "a.json", **settings)


def test_the_smallest_byte_bpe(corpus_file: Path, tmp_path: Path) -> None:
    """The size that the message names is had, and 256 bytes spell everything."""
    tokenizer = train_byte_bpe(
        corpus_file, tmp_path / "a.json", vocab_size=259, symbols=["the cat", "A"]
    )
    assert tokenizer.n_words == 259 and tokenizer.vocabulary.merges == []
    assert tokenizer.vocabulary.added_tokens == {"the cat": 256, "A": ord("A") - 33}
    text = "A the cat 你好"
    ids = tokenizer.encode(text, False, False)
    assert tokenizer.decode(ids) == text and len(ids) == len(text.encode()) - 6


# ---------------------------------------------------------------------------- SentencePiece


@pytest.mark.parametrize("symbols", [(), ("e2e4", "the cat")])
def test_a_token_for_every_character(symbols: tuple[str, ...], tmp_path: Path) -> None:
    """The ids are as many as the characters, a rare one's, too; others are spelt in bytes."""
    pick = random.Random(0)
    chinese = [chr(0x4E00 + i) for i in range(1500)]
    text = "\n".join(["the cat sat.\tOn 1934", "".join(pick.choices(chinese, k=90)), "丠"])
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    train_vocabulary([tmp_path / "a.txt"], tmp_path / "a", vocab_size="chars", symbols=symbols)
    tokenizer = Tokenizer(tokenizer_model=tmp_path / "a")
    without = text.replace("the cat", "") if symbols else text
    characters = {*without, " "} - {"\n"}  # for which there is a byte
    assert tokenizer.n_words == 3 + 256 + len(characters) + len(symbols)
    ids = tokenizer.encode(text, False, False)
    assert len(ids) == len(text) - (len("the cat") - 1) * bool(symbols)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_byte_lengths()[ids].sum() == len(text.encode())
    foreign = tokenizer.encode("a🙂", False, False)
    assert len(foreign) == 5 and tokenizer.decode(foreign) == "a🙂"
    assert tokenizer.byte_fallback_share(ids) == 0


def test_character_coverage_leaves_out_rare_characters(tmp_path: Path) -> None:
    """Of a script of thousands not all are wanted."""
    (tmp_path / "a.txt").write_text("ab" * 500 + "c", encoding="utf-8")
    for coverage, size in ((None, 3), (0.99, 2)):
        train_vocabulary(
            [tmp_path / "a.txt"], tmp_path / "a", vocab_size="chars", character_coverage=coverage
        )
        pieces = Tokenizer(tokenizer_model=tmp_path / "a")
        assert pieces.n_words == 3 + 256 + size + 1  # the sign for a space
        assert pieces.decode(pieces.encode("abc ", False, False)) == "abc "


def test_sizes_with_symbols(corpus_file: Path, tmp_path: Path) -> None:
    """The largest and the smallest size that a message names are had, with symbols, too."""
    for size in (1_000_000, 10):
        with pytest.raises(UsageError, match="at (most|least) \\d+") as error:
            train_vocabulary(
                [corpus_file], tmp_path / "a", vocab_size=size, symbols=["the cat", "e2e4"]
            )
        named = int("".join(filter(str.isdigit, str(error.value).split("at ")[-1])))
        train_vocabulary(
            [corpus_file], tmp_path / "a", vocab_size=named, symbols=["the cat", "e2e4"]
        )
        assert Tokenizer(tokenizer_model=tmp_path / "a").n_words == named


def test_llama2c_cannot_hold_symbols(corpus_file: Path, tmp_path: Path) -> None:
    """run.c merges letters and looks for no symbol: its ids would be others."""
    train_vocabulary([corpus_file], tmp_path / "a", symbols=["e2e4"])
    with pytest.raises(UsageError, match="symbols of its own .'e2e4'., which llama2.c"):
        tokenizer_bin(Tokenizer(tokenizer_model=tmp_path / "a"))
    train_vocabulary([corpus_file], tmp_path / "a", vocab_size="chars")
    with pytest.raises(UsageError, match="with a space before it"):
        tokenizer_bin(Tokenizer(tokenizer_model=tmp_path / "a"))


def test_a_symbol_that_cannot_be_one_token(corpus_file, tmp_path, monkeypatch) -> None:
    """What was trained is tried, and not believed."""
    monkeypatch.setattr(training, "SPACE", "_")
    with pytest.raises(UsageError, match="--symbols: 'the cat' cannot be made one token"):
        train_vocabulary([corpus_file], tmp_path / "a", symbols=["the cat"])
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------------------- command line


def test_the_command_line(corpus_file: Path, tmp_path: Path, capsys) -> None:
    """Both kinds, with symbols of a file, and what is refused in one line."""
    pytest.importorskip("tokenizers")
    (tmp_path / "symbols.txt").write_text("e2e4\nthe cat\n", encoding="utf-8")
    output = tmp_path / "v"
    train = ["train", "--input", str(corpus_file), "--output", str(output), "--overwrite"]
    symbols = ["--symbols", str(tmp_path / "symbols.txt")]
    for more in (["--kind", "byte-bpe"], ["--vocab_size", "chars"], []):
        assert main([*train, *symbols, *more]) == 0
        added = Tokenizer(tokenizer_model=output).vocabulary.added_tokens
        assert [*added] == ["e2e4", "the cat"]
    capsys.readouterr()
    for more, words in (
        (["--kind", "bpe"], "--kind: invalid choice: 'bpe'"),
        (["--vocab_size", "char"], "--vocab_size: 'char' is not a whole number"),
        (["--symbols", str(tmp_path / "absent")], "absent: no such file"),
        (["--kind=byte-bpe", "--character_coverage=1"], "--character_coverage: --kind byte-bpe"),
    ):
        assert main([*train, *more]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error


def test_without_the_package(corpus_file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """One line says what to install."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    words = ["train", "--input", str(corpus_file), "--kind", "byte-bpe", "--output"]
    assert main([*words, str(tmp_path / "a.json")]) == 2
    assert "pip install tokenizers" in capsys.readouterr().err
