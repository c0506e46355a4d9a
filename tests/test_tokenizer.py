"""tokenizer.py: encoding and decoding, training a vocabulary, export, command line."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import FRAGMENTS, OTHERS, PLAIN, corpus_lines, train, vocabulary

from config import LlamaConfig
from llama import Llama
from minllama.system.errors import Interrupted, UsageError
from minllama.text.reading import Reading
from minllama.vocabulary.lost import Lost, count_lost
from minllama.vocabulary.sentence_piece import SPACE
from tokenizer import (
    Tokenizer,
    export_tokenizer_bin,
    main,
    tokenizer_of,
    train_vocabulary,
    vocabulary_remedy,
)

ROOT = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------------------- the tokenizer


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=40).map("".join))
def test_decode_undoes_encode(text: str) -> None:
    """Newlines, tabs, NUL and emoji come back through byte tokens, spaces as they were."""
    text = text.replace(SPACE, "")  # the one character that SentencePiece itself takes
    tokenizer = vocabulary("ours")
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


def test_the_ids_are_those_of_the_assignment(real_data: Path) -> None:
    """Its tokenizer gave these; max_len cuts before BOS and EOS are added."""
    tokenizer = Tokenizer(max_len=3, tokenizer_model=real_data / "tokenizer.model")
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    assert tokenizer.pad_id == 3
    assert tokenizer.encode("a b c d", True, True) == [1, 263, 289, 274, 2]
    assert tokenizer.encode("a\nb", False, False) == [263, 13, 29890]
    assert tokenizer.fingerprint == "9e556afd44213b6b"


def test_the_tokenizer_of_a_model_is_the_one_that_it_carries() -> None:
    """`Tokenizer(None)` is the stories', which reads another model's ids wrongly without a word."""
    model = Llama(LlamaConfig(dim=8, n_layers=1, n_heads=1, vocab_size=vocabulary("ours").n_words))
    with pytest.raises(UsageError, match="the model carries no vocabulary"):
        tokenizer_of(model)
    model.vocabulary = vocabulary("ours").model_bytes
    assert tokenizer_of(model).fingerprint == vocabulary("ours").fingerprint
    model.vocabulary = vocabulary("unigram").model_bytes
    with pytest.raises(UsageError, match="m.bin: .* do not belong together"):
        tokenizer_of(model, "m.bin")


def test_pad_id_without_bytes() -> None:
    """A vocabulary without byte tokens gave the unknown token's id by accident; 0 by intent."""
    assert vocabulary("unigram").pad_id == 0


@pytest.mark.parametrize("data", [b"", b"hello", b"\n\x03abc", b"\x00" * 100])
def test_not_a_model(data: bytes, tmp_path: Path) -> None:
    """A wrong file is named; SentencePiece's own words name its C++ source."""
    (tmp_path / "wrong.model").write_bytes(data)
    with pytest.raises(UsageError, match="wrong.model: not a SentencePiece model"):
        Tokenizer(tokenizer_model=tmp_path / "wrong.model")
    with pytest.raises(UsageError, match="absent.model: no such file"):
        Tokenizer(tokenizer_model=tmp_path / "absent.model")
    with pytest.raises(UsageError, match="python data/download.py tokenizer"):
        Tokenizer(tokenizer_model=tmp_path / "tokenizer.model")
    with pytest.raises(UsageError, match="the folder holds no tokenizer.model and no"):
        Tokenizer(tokenizer_model=tmp_path)


def test_a_damaged_model() -> None:
    """A flipped bit gives a vocabulary that can be used, or one line that says what it is not."""
    chance, whole = random.Random(0), vocabulary("ours").model_bytes
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        try:
            tokenizer = Tokenizer(tokenizer_model=bytes(damaged))
        except UsageError as error:
            refused += 1
            assert str(error).startswith("the vocabulary: ")
        else:
            assert len(tokenizer.token_byte_lengths()) == tokenizer.n_words
            assert len(tokenizer.vocabulary.added_tokens) <= 1
    assert refused > 10


def test_a_vocabulary_without_bos_is_refused() -> None:
    """Its documents would run into each other."""
    with pytest.raises(UsageError, match="no BOS or no EOS"):
        Tokenizer(tokenizer_model=train(bos_id=-1))


@pytest.mark.parametrize("name", [*PLAIN, *OTHERS, "embedded", "llama-2"])
def test_what_is_plain_bpe(name: str) -> None:
    """BPE with byte tokens over unchanged text and a space in front; nothing else may pass."""
    # Of these, though they are, no text can be cut.
    bpe_anyway = {"spaces-inside-pieces", "newlines-in-a-piece", "space-in-a-symbol"}
    assert vocabulary(name).vocabulary.is_plain_bpe == (name not in OTHERS or name in bpe_anyway)


@pytest.mark.parametrize("name", ["ours", "embedded", "llama-2"])
def test_token_byte_lengths_sum_to_the_text(name: str) -> None:
    """Bits per byte divide by these: with the space that is put in front they are the text."""
    tokenizer = vocabulary(name)
    text = "Hello  wörld\n你好 😀\x00 <s>"
    lengths = tokenizer.token_byte_lengths()[tokenizer.encode(text, True, True)]
    assert lengths.sum() == len(text.encode()) + 1


@pytest.mark.parametrize("name", ["ours", "embedded", "no-dummy-prefix", "unigram-identity"])
def test_a_vocabulary_that_loses_nothing_is_not_complained_of(name: str) -> None:
    lost = count_lost(vocabulary(name).vocabulary, corpus_lines())
    assert (lost.unknown, lost.lost.total(), lost.lines()) == (0, 0, [])


def test_what_a_vocabulary_loses_is_counted() -> None:
    """One without byte tokens lost every newline and 6 % of the tokens unsaid, and its bits per
    byte looked better for it; a real U+2581 came back as a space, unsaid as well."""
    text = "the cat\nsat 1934\n"
    lost = count_lost(vocabulary("no-byte-fallback").vocabulary, [text])
    pieces = vocabulary("no-byte-fallback").sp_model.encode(text, out_type=str)
    alphabet = {*"".join(map(vocabulary("no-byte-fallback").sp_model.id_to_piece, range(3, 150)))}
    missing = [character for character in text.replace(" ", SPACE) if character not in alphabet]
    assert missing.count("\n") == 2 and lost.lost == Counter(missing)
    unknown = sum(not {*piece} <= alphabet for piece in pieces)
    assert (lost.tokens, lost.unknown, lost.characters) == (len(pieces), unknown, len(text))
    (line,) = lost.lines()
    assert f"{unknown / len(pieces):.1%} of its tokens are <unk>" in line
    assert f"{len(missing)} of {len(text)} characters do not come back ('\\n' 2" in line
    assert "do not compare" in line and lost.spoils_bits_per_byte
    lost = count_lost(vocabulary("nfkc").vocabulary, ["\ufb01t"])
    assert lost.unknown == 0 and lost.lost == Counter("\ufb01") and lost.spoils_bits_per_byte
    (line,) = lost.lines()
    assert line.startswith("warning: the vocabulary loses some of the text: 1 of 2 characters")
    assert "<unk>" not in line, "of which there are 0.0 %"
    lost = count_lost(vocabulary("nfkc").vocabulary, ["\ufb01t" + "a cat sat " * 1000])
    assert lost.lines()[0].startswith("note: ")
    few = Lost(10_000, 2, 40_000, Counter({"x": 3}))
    assert few.lines()[0].startswith("note: ")
    assert "text: 2 of its tokens are <unk>" in few.lines()[0]
    lost = count_lost(vocabulary("embedded").vocabulary, [f"{SPACE}\u2582\u2583"])
    assert "U+2581" in "".join(lost.lines()) and not lost.spoils_bits_per_byte


@pytest.mark.parametrize("text", ["".join(random.Random(0).choices("ACGT", k=20_000)), "ab\n" * 9])
def test_a_text_without_spaces_leaves_their_sign_a_piece(text: str, tmp_path: Path) -> None:
    """Character coverage dropped it: "ACGT ACGT" came back with signs for its spaces."""
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    train_vocabulary([tmp_path / "a.txt"], tmp_path / "a.model")
    tokenizer = Tokenizer(tokenizer_model=tmp_path / "a.model")
    assert tokenizer.decode(tokenizer.encode("ACGT ab", bos=True, eos=True)) == "ACGT ab"
    assert SPACE in tokenizer.sp_model.encode("ACGT", out_type=str)[0]


def test_byte_fallback_share() -> None:
    """The share of a text's bytes for whose characters the vocabulary has no piece.

    Of plays under a vocabulary of their own 3.6 % were said to be lacking: their newlines.
    """
    tokenizer = vocabulary("embedded")
    texts = (("the little fox\nran home\n", 0, 0), ("从前有一个小女孩", 0.9, 1))
    for text, low, high in texts:
        share = tokenizer.byte_fallback_share(np.array(tokenizer.encode(text, True, True)))
        assert low <= share <= high
    assert tokenizer.byte_fallback_share(np.array([], dtype=np.uint16)) == 0


def test_the_remedy_names_what_can_be_fetched() -> None:
    """Llama-2's vocabulary is a download away; of others only the size is known."""
    assert "python data/download.py tokenizer" in vocabulary_remedy(32000)
    assert "4,096 pieces with --tokenizer_model" in vocabulary_remedy(4096)
    assert "download" not in vocabulary_remedy(4096)


# ---------------------------------------------------------------------------- training


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(corpus_lines()), encoding="utf-8")
    return path


def test_training_a_vocabulary_hears_a_request_to_stop(corpus_file, tmp_path, monkeypatch) -> None:
    """SentencePiece trains for minutes in C++, where no Ctrl-C was heard."""
    endless = threading.Event()
    trainer = sentencepiece.SentencePieceTrainer
    monkeypatch.setattr(trainer, "train", lambda **_: endless.wait())

    def check_stop() -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        train_vocabulary([corpus_file], tmp_path / "a.model", check_stop=check_stop)
    endless.set()
    assert not (tmp_path / "a.model").exists()


def test_training_is_reproducible_and_names_no_path(corpus_file: Path, tmp_path: Path) -> None:
    """Two machines get the same fingerprint; a path in the file would tell on its maker."""
    for name in ("a.model", "b.model"):
        train_vocabulary([corpus_file], tmp_path / name, vocab_size=400)
    model = (tmp_path / "a.model").read_bytes()
    assert model == (tmp_path / "b.model").read_bytes()
    assert str(tmp_path).encode() not in model and b"corpus" not in model
    tokenizer = Tokenizer(tokenizer_model=model)
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id) == (400, 1, 2)
    assert tokenizer.sp_model.is_byte(tokenizer.pad_id) and tokenizer.vocabulary.is_plain_bpe
    text = "the cat\n\nsat  on 1934 mats 😀\n"
    assert tokenizer.decode(tokenizer.encode(text, True, True)) == text
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


def test_vocab_size_that_does_not_fit(corpus_file: Path, tmp_path: Path) -> None:
    """The size that the message names does work."""
    for size, words in [(100_000, "too large: .* at most (\\d+)"), (259, "at least (\\d+)")]:
        with pytest.raises(UsageError, match=words) as error:
            train_vocabulary([corpus_file], tmp_path / "a.model", vocab_size=size)
        assert not (tmp_path / "a.model").exists()
        named = int("".join(filter(str.isdigit, str(error.value).split("at ")[-1])))
        train_vocabulary([corpus_file], tmp_path / "b.model", vocab_size=named)
        assert Tokenizer(tokenizer_model=tmp_path / "b.model").n_words == named


def test_training_reads_what_is_asked(tmp_path: Path) -> None:
    """A line longer than SentencePiece's limit was dropped in silence; sampling bounds the rest."""
    long_line = tmp_path / "a.jsonl"
    long_line.write_text(json.dumps({"t": "zebra " * 20_000}), encoding="utf-8")
    train_vocabulary(
        [long_line], tmp_path / "a.model", vocab_size=270, reading=Reading(text_field="t")
    )
    zebra = Tokenizer(tokenizer_model=tmp_path / "a.model").encode("zebra", False, False)
    assert len(zebra) == 1
    (tmp_path / "b.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(UsageError, match="no text"):
        train_vocabulary([tmp_path / "b.txt"], tmp_path / "b.model", vocab_size=300)
    many = tmp_path / "c.txt"
    many.write_text("\n".join(corpus_lines() * 20), encoding="utf-8")
    train_vocabulary([many], tmp_path / "c.model", vocab_size=400, max_bytes=20_000)
    assert Tokenizer(tokenizer_model=tmp_path / "c.model").n_words == 400


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-bpe"])
def test_a_vocabulary_is_trained_on_dialogues(kind: str, tmp_path: Path) -> None:
    """The file that --option finetune reads was refused for a chat's vocabulary: no field 'text'.

    It is the vocabulary of all that is said in it, in whatever form.
    """
    if kind == "byte-bpe":
        pytest.importorskip("tokenizers")
    lines, plain = [], []
    for number, line in enumerate(corpus_lines()):
        question, answer = line[: len(line) // 2].strip() or "a", line[len(line) // 2 :].strip()
        answer = answer or "b"
        turns = [{"role": "system", "content": "Be short."}]
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        record = {"messages": turns} if number % 2 else {"prompt": question, "response": answer}
        lines.append(json.dumps(record))
        plain.append("\n".join([*["Be short."] * (number % 2), question, answer]))
    (tmp_path / "chat.jsonl").write_text("\n".join(lines), encoding="utf-8")
    texts = "\n".join(json.dumps({"text": text}) for text in plain)
    (tmp_path / "text.jsonl").write_text(texts, encoding="utf-8")
    for name in ("chat", "text"):
        output = tmp_path / f"{name}.json"
        train_vocabulary([tmp_path / f"{name}.jsonl"], output, vocab_size=400, kind=kind)
    assert (tmp_path / "chat.json").read_bytes() == (tmp_path / "text.json").read_bytes()
    (tmp_path / "chat.jsonl").write_text(f"{lines[0]}\n{{}}\n", encoding="utf-8")
    with pytest.raises(UsageError, match="chat.jsonl:2"):
        train_vocabulary([tmp_path / "chat.jsonl"], tmp_path / "bad", vocab_size=400, kind=kind)


# ---------------------------------------------------------------------------- export


def test_export_reads_back(tmp_path: Path) -> None:
    """llama2.c's reader: longest token, then score, length and bytes of each; byte tokens named."""
    tokenizer = vocabulary("ours")
    export_tokenizer_bin(tokenizer, tmp_path / "tokenizer.bin")
    data = (tmp_path / "tokenizer.bin").read_bytes()
    (longest,) = struct.unpack_from("<I", data)
    at, tokens, scores = 4, [], []
    for _ in range(tokenizer.n_words):
        score, size = struct.unpack_from("<fi", data, at)
        tokens.append(data[at + 8 : at + 8 + size])
        scores.append(score)
        at += 8 + size
    assert at == len(data) and longest == max(map(len, tokens))
    assert tokens[1:3] == [b"\n<s>\n", b"\n</s>\n"] and tokens[13] == b"<0x0A>"
    assert b" the" in tokens and not any(SPACE.encode() in token for token in tokens)
    expected = [tokenizer.sp_model.get_score(i) for i in range(tokenizer.n_words)]
    assert np.array_equal(np.float32(scores), np.float32(expected))


# ---------------------------------------------------------------------------- command line


def test_command_line(corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Both spellings; nothing is overwritten without being asked; bad input is one line, 2."""
    model, exported = tmp_path / "my.model", tmp_path / "tokenizer.bin"
    train = ["train", "--input", str(corpus_file), "--vocab-size=400", "--output", str(model)]
    assert main(train) == 0
    assert "400 tokens" in capsys.readouterr().out
    export = ["export", "--tokenizer-model", str(model), "--output", str(exported)]
    assert main(export) == 0 and exported.stat().st_size > 1000
    capsys.readouterr()
    bad = [
        (train, "--overwrite replaces it"),
        (export, "--overwrite replaces it"),
        ([*train, "--overwrite", "--vocab_size", "0"], "--vocab_size: 0 must be at least 1"),
        ([*train, "--overwrite", "--input", "absent.txt"], "--input absent.txt: no such file"),
        (
            [*train, "--overwrite", "--character_coverage", "2"],
            "--character_coverage: 2 must be at most 1",
        ),
        (["train", "--input", "a.txt"], "--output"),
        (["tain"], "invalid choice"),
        ([*train, "--vocabsize", "9"], "--vocabsize: no such option; did you mean --vocab_size?"),
        ([*export, "--overwrite", "--tokenizer_model", str(corpus_file)], "not a SentencePiece"),
        ([*train[:-1], str(corpus_file / "x.model")], "cannot be"),
        # Once tracebacks: a name that no file can have, a NUL, argparse's empty list.
        ([*train[:-1], "x" * 300], f"--output: '{'x' * 40}'...: is too long for a path"),
        ([*train[:-1], "a\0b"], r"--output: 'a\x00b' holds a NUL"),
        ([*train[:-2], "--output=--"], "--output=--: -- is no value"),
        (["train", "--input", "x" * 300, "--output", "y"], "ile name too long"),
        ([*train, "--overwrite", "--encoding", "utf-7"], "--encoding utf-7: no text encoding"),
    ]
    for arguments, words in bad:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert main([*train, "--overwrite"]) == 0


def test_run_as_a_script(tmp_path: Path) -> None:
    """The command of the README, in a process of its own, from another folder."""
    command = [sys.executable, str(ROOT / "tokenizer.py"), "train", "--input", "absent*.txt"]
    done = subprocess.run(
        [*command, "--output", "x.model"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and "absent*.txt: matches no file" in done.stderr


def test_a_damaged_vocabulary_is_found(corpus_file, tmp_path):
    """Nine of 70 damaged vocabularies ended in a traceback, and 26 passed in silence.

    Ours carry a checksum that SentencePiece passes over; any damage of the checksum counts, too.
    """
    path = tmp_path / "a.model"
    train_vocabulary([corpus_file], path, vocab_size=400)
    whole = path.read_bytes()
    assert Tokenizer(tokenizer_model=path).encode("a", False, False)
    for at in (0, 1, 2, 9, 30, 90, 200, len(whole) // 2, len(whole) - 1):
        for content in (whole[:at], whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]):
            path.write_bytes(content)
            with pytest.raises(UsageError, match="is damaged|not a SentencePiece model"):
                Tokenizer(tokenizer_model=path)


def test_what_is_no_utf8_is_read_alike_alone_and_among_others(tokenizer: Tokenizer):
    """JSON can spell half of a character: SentencePiece took no list with one, which ended it."""
    texts = ["a \ud800 b", "fox"]
    encoded = tokenizer.encode_many(texts, bos=True)
    assert encoded == [tokenizer.encode(text, True, False) for text in texts]
    assert tokenizer.decode(encoded[0]) == "a ? b"
