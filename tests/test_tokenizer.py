"""tokenizer.py: reading corpora, exact encoding in pieces, training, export, command line."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UsageError
from tokenizer import (
    EMBEDDED_VOCABULARY,
    Block,
    DocumentEncoder,
    Reading,
    TextSource,
    Tokenizer,
    export_tokenizer_bin,
    find_text_files,
    fingerprint,
    is_labelled,
    main,
    read_documents,
    train_vocabulary,
)

ROOT = Path(__file__).resolve().parents[1]
LLAMA = ROOT.parent / "shared" / "data" / "tokenizer.model"

# ------------------------------------------------------------------------------- vocabularies

WORDS = (
    "the cat sat on a mat and then it ran home with two dogs, 1934 was late.\tHello! "
    "fi ﬁ é e\u0301 你好 世界。 今天，天气 很好。 😀 naïve\u3000x == <s> "
).split(" ")


def _corpus() -> list[str]:
    pick = random.Random(3)
    gap = [" "] * 8 + ["  ", "\t", "    "]
    syllables = "ba be lo mi nu rak ton vel sha dri".split()
    words = WORDS + ["".join(pick.choices(syllables, k=pick.randint(1, 3))) for _ in range(150)]
    return ["".join(w + pick.choice(gap) for w in pick.choices(words, k=12)) for _ in range(400)]


def _train(**options: object) -> bytes:
    model = io.BytesIO()
    defaults = dict(
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        num_threads=1,
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus()), model_writer=model, **{**defaults, **options}
    )
    return model.getvalue()


VARIANTS: dict[str, dict[str, object]] = {
    "ours": {},
    "no-byte-fallback": {
        "byte_fallback": False,
        "vocab_size": 150,
        "character_coverage": 0.98,
    },
    "spaces-inside-pieces": {"split_by_whitespace": False, "vocab_size": 700},
    "space-last": {"treat_whitespace_as_suffix": True},
    "no-dummy-prefix": {"add_dummy_prefix": False},
    "own-symbols": {"user_defined_symbols": ["\n\n", "t\u2581s", "<sep>"]},
    "trims": {"remove_extra_whitespaces": True},
    "nmt-nfkc": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "nfkc-cf": {
        "normalization_rule_name": "nfkc_cf",
        "byte_fallback": False,
        "vocab_size": 150,
        "character_coverage": 0.98,
    },
    "unigram": {
        "model_type": "unigram",
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
        "byte_fallback": False,
        "vocab_size": 130,
    },
}
NAMES = [*VARIANTS, "embedded", "llama-2"]
_vocabularies: dict[str, Tokenizer] = {}


def vocabulary(name: str) -> Tokenizer:
    if name not in _vocabularies:
        path = {"embedded": EMBEDDED_VOCABULARY, "llama-2": LLAMA}.get(name)
        if path is not None and not path.is_file():
            pytest.skip(f"{path.name} is not there")
        model = path.read_bytes() if path is not None else _train(**VARIANTS[name])
        _vocabularies[name] = Tokenizer(tokenizer_model=model)
    return _vocabularies[name]


# ------------------------------------------------------------------------------- in pieces

SPACES = [" ", "  ", "     ", "\n", "\n\n", "\r\n", "\t", "\u2581", " \u2581"]
ODD = ["\x00", "\x07", "\u0301", "\u0338", "\u3099", "\u200b", "\ufeff", "\u00a0", "\u3000", "。"]
FRAGMENTS = [*WORDS, *SPACES, *ODD]
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=40).map("".join)


def _blocks(text: str, sizes: list[int]) -> list[Block]:
    """`text` in blocks of the given sizes, over and over; the end told by an empty block."""
    blocks, at = [], 0
    while at < len(text):
        size = sizes[len(blocks) % len(sizes)]
        blocks.append(Block(text[at : at + size], False))
        at += size
    return [*blocks, Block("", True)]


def _encode(encoder: DocumentEncoder, documents: list[str], sizes: list[int]) -> list[list[int]]:
    blocks = [block for text in documents for block in _blocks(text, sizes)]
    found: list[list[int]] = []
    for batch in encoder.encode(blocks):
        for part in batch:
            if part.starts:
                found.append([])
            found[-1] += part.ids.tolist()
    return found


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    documents=st.lists(texts.filter(bool), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    part_chars=st.integers(1, 6),
    batch_chars=st.sampled_from([20, 300]),
    threads=st.sampled_from([1, 2]),
    word_cache=st.booleans(),
)
def test_pieces_give_the_ids_of_the_whole(
    name: str,
    documents: list[str],
    sizes: list[int],
    part_chars: int,
    batch_chars: int,
    threads: int,
    word_cache: bool,
) -> None:
    """Exactness is the property that lets a document be larger than memory and words be cached."""
    tokenizer = vocabulary(name)
    encoder = DocumentEncoder(
        tokenizer,
        threads=threads,
        part_chars=part_chars,
        batch_chars=batch_chars,
        word_cache=word_cache,
    )
    found = _encode(encoder, documents, sizes)
    assert found == [tokenizer.sp_model.encode(text) for text in documents]


@pytest.mark.parametrize(
    ("name", "cuts"),
    [("ours", True), ("nmt-nfkc", True), ("embedded", True), ("llama-2", True)]
    + [("space-last", False), ("unigram", False)],
)
def test_long_documents_are_cut(name: str, cuts: bool) -> None:
    """Exactness must not come from never cutting: ordinary text is cut at once where it may be."""
    encoder = DocumentEncoder(vocabulary(name), threads=1, part_chars=100)
    parts = list(encoder._parts(_blocks(" ".join(_corpus()), [64])))
    assert (max(len(part.text) for part in parts) < 200) == cuts
    assert (len(parts) > 100) == cuts


def test_a_long_line_without_spaces_is_cut(real_data: Path) -> None:
    """50 MB of base64 on one line once had to be encoded whole, in gigabytes of memory."""
    encoder = DocumentEncoder(Tokenizer(tokenizer_model=LLAMA), threads=1, part_chars=1000)
    pick = random.Random(0)
    text = "".join(pick.choices("ABCDEFGHIJabcdefghij0123456789+/", k=30_000))
    assert max(len(part.text) for part in encoder._parts(_blocks(text, [512]))) < 2000


def test_unigram_sums_depend_on_all_the_text_before(real_data: Path) -> None:
    """Why unigram documents are encoded whole: a cut that no piece spans still changes ids."""
    model = io.BytesIO()
    lines = (real_data / "sst-train.txt").read_text(encoding="utf-8").split("\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines[:3000]),
        model_writer=model,
        vocab_size=1000,
        model_type="unigram",
        minloglevel=2,
    )
    tokenizer = Tokenizer(tokenizer_model=model.getvalue())
    text = (real_data / "cfimdb-train.txt").read_text(encoding="utf-8")[:300_000]
    encoder = DocumentEncoder(tokenizer, part_chars=1000)
    assert _encode(encoder, [text], [4096]) == [tokenizer.sp_model.encode(text)]


def test_threads_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With three threads or more SentencePiece once got all, the cache nothing."""
    tokenizer, shares = vocabulary("ours"), {"_look_up": 0, "_encode_parts": 0}
    for name in shares:
        real = getattr(DocumentEncoder, name)

        def counted(self, parts, *rest, name=name, real=real):
            shares[name] += len(parts)
            return real(self, parts, *rest)

        monkeypatch.setattr(DocumentEncoder, name, counted)
    encoder = DocumentEncoder(tokenizer, threads=8, part_chars=50, batch_chars=2000)
    documents = ["".join(_corpus()) * 2]
    found = _encode(encoder, documents, [4096])
    assert found == [tokenizer.sp_model.encode(text) for text in documents]
    assert min(shares.values()) > 0 and 0.05 <= encoder.look_up_share <= 0.95


def test_the_word_cache_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are forgotten when there are too many, and the ids stay right."""
    monkeypatch.setattr("tokenizer.WORD_CACHE_ENTRIES", 50)
    monkeypatch.setattr("tokenizer.WORD_CACHE_CHARS", 5)
    tokenizer = vocabulary("ours")
    encoder = DocumentEncoder(tokenizer, threads=1, batch_chars=200, word_cache=True)
    documents = [f"{line} {number}" for number, line in enumerate(_corpus())]
    found = _encode(encoder, documents, [1000])
    assert found == [tokenizer.sp_model.encode(text) for text in documents]
    assert len(encoder.words) <= 50 and max(map(len, encoder.words)) <= 5


# ------------------------------------------------------------------------------- the wrapper


@settings(max_examples=100, deadline=None, derandomize=True)
@given(texts)
def test_decode_undoes_encode(text: str) -> None:
    """Newlines, tabs, NUL and emoji come back through byte tokens, spaces as they were."""
    text = text.replace("\u2581", "")  # the one character that SentencePiece itself takes
    tokenizer = vocabulary("ours")
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


def test_wrapper_is_the_original(real_data: Path) -> None:
    """The ids that the assignment's tokenizer gives; max_len cuts before BOS and EOS are added."""
    tokenizer = Tokenizer(max_len=3, tokenizer_model=real_data / "tokenizer.model")
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    assert tokenizer.pad_id == 3
    assert tokenizer.encode("a b c d", True, True) == [1, 263, 289, 274, 2]
    assert tokenizer.encode("a\nb", False, False) == [263, 13, 29890]
    assert tokenizer.fingerprint == fingerprint(tokenizer.model_bytes) == "9e556afd44213b6b"


def test_pad_id_without_bytes() -> None:
    """A vocabulary without byte tokens gave the unknown token's id by accident; 0 by intent."""
    assert vocabulary("unigram").pad_id == 0


@pytest.mark.parametrize("data", [b"", b"hello", b"\n\x03abc", b"\x00" * 100])
def test_not_a_model(data: bytes, tmp_path: Path) -> None:
    """A wrong file is named; SentencePiece's own words name its C++ source."""
    (tmp_path / "wrong.model").write_bytes(data)
    with pytest.raises(UsageError, match="wrong.model: not a SentencePiece model"):
        Tokenizer(tokenizer_model=tmp_path / "wrong.model")
    with pytest.raises(UsageError, match="no such file"):
        Tokenizer(tokenizer_model=tmp_path / "absent.model")


@pytest.mark.parametrize("name", ["ours", "embedded", "llama-2"])
def test_token_byte_lengths_sum_to_the_text(name: str) -> None:
    """Bits per byte divide by these: with the space that is put in front they are the text."""
    tokenizer = vocabulary(name)
    text = "Hello  wörld\n你好 😀\x00 <s>"
    lengths = tokenizer.token_byte_lengths()[tokenizer.encode(text, True, True)]
    assert lengths.sum() == len(text.encode()) + 1


# ------------------------------------------------------------------------------- finding files


def test_find_text_files(tmp_path: Path) -> None:
    """Folders at any depth, globs, names with brackets; sorted, none twice."""
    for name in ["b.txt", "a/c.jsonl", "a/d.txt.gz", "a/skip.png", "x[1].txt"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x", encoding="utf-8")
    names = [tmp_path / "x[1].txt", tmp_path / "*.txt", tmp_path]
    found = [p.relative_to(tmp_path).as_posix() for p in find_text_files(names)]
    assert found == ["x[1].txt", "b.txt", "a/c.jsonl", "a/d.txt.gz"]
    for bad in ("nothing.txt", "*.md"):
        with pytest.raises(UsageError, match="--pretrain_data .*(no such file|matches no file)"):
            find_text_files([tmp_path / bad])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no"):
        find_text_files([tmp_path / "empty"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_refused(tmp_path: Path) -> None:
    """Opening a FIFO that nobody writes to hung for ever."""
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UsageError, match="not a regular file"):
        find_text_files([tmp_path / "pipe.txt"])
    for path, words in [(tmp_path / "pipe.txt", "not a regular file"), (tmp_path, "a folder")]:
        with pytest.raises(UsageError, match=words):
            list(read_documents(path, Reading()))


# ------------------------------------------------------------------------------- reading


def documents(path: Path, **options: object) -> list[str]:
    found, open_text = [], ""
    for block in read_documents(path, Reading(**options)):
        open_text += block.text
        if block.ends:
            found.append(open_text)
            open_text = ""
    assert not open_text
    return found


def written(path: Path, data: bytes) -> Path:
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
    """--encoding_errors replace reads on."""
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


def test_a_file_that_grows_while_it_is_read(tmp_path: Path) -> None:
    """Half of one version and half of the next would be tokens of no file."""
    path = written(tmp_path / "a.txt", b"word " * 200_000)
    blocks = read_documents(path, Reading())
    next(blocks)
    with open(path, "ab") as file:
        file.write(b"more")
    with pytest.raises(UsageError, match="changed while it was read"):
        list(blocks)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.binary(max_size=200) | texts.map(str.encode), size=st.integers(1, 7))
def test_blocks_are_python_s_own_decoding(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, size: int
) -> None:
    """Whatever the bytes and the block size: the text of Python's decoder, or an error."""
    path = tmp_path_factory.mktemp("f") / "a.txt"
    path.write_bytes(data)
    if data.startswith(b"\x1f\x8b"):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenizer.READ_BYTES", size)
        try:
            expected = data.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            with pytest.raises(UsageError, match=f"a.txt:{line}: byte"):
                list(TextSource(path).blocks())
            return
        assert "".join(TextSource(path).blocks()) == expected
        lines = [line for _, line in TextSource(path).lines()]
        assert "\n".join(lines) == expected.removesuffix("\n")


# ------------------------------------------------------------------------------- training


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(_corpus()), encoding="utf-8")
    return path


def test_training_is_reproducible_and_names_no_path(corpus_file: Path, tmp_path: Path) -> None:
    """Two machines get the same fingerprint; a path in the file would tell on its maker."""
    for name in ("a.model", "b.model"):
        train_vocabulary([corpus_file], tmp_path / name, vocab_size=400)
    model = (tmp_path / "a.model").read_bytes()
    assert model == (tmp_path / "b.model").read_bytes()
    assert str(tmp_path).encode() not in model and b"corpus" not in model
    tokenizer = Tokenizer(tokenizer_model=model)
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id) == (400, 1, 2)
    assert tokenizer.sp_model.is_byte(tokenizer.pad_id)
    text = "the cat\n\nsat  on 1934 mats 😀\n"
    assert tokenizer.decode(tokenizer.encode(text, True, True)) == text
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


def test_vocab_size_that_does_not_fit(corpus_file: Path, tmp_path: Path) -> None:
    """The size that the message names does work."""
    for size, words in [(100_000, "too large .* at most (\\d+)"), (259, "at least (\\d+)")]:
        with pytest.raises(UsageError, match=words) as error:
            train_vocabulary([corpus_file], tmp_path / "a.model", vocab_size=size)
        assert not (tmp_path / "a.model").exists()
        named = int("".join(filter(str.isdigit, str(error.value).split("at ")[-1])))
        train_vocabulary([corpus_file], tmp_path / "b.model", vocab_size=named)
        assert Tokenizer(tokenizer_model=tmp_path / "b.model").n_words == named


def test_training_reads_what_is_asked(tmp_path: Path) -> None:
    """A line longer than SentencePiece's limit was dropped in silence; sampling bounds the rest."""
    long_line = written(tmp_path / "a.jsonl", json.dumps({"t": "zebra " * 20_000}).encode())
    train_vocabulary([long_line], tmp_path / "a.model", vocab_size=270, text_field="t")
    zebra = Tokenizer(tokenizer_model=tmp_path / "a.model").encode("zebra", False, False)
    assert len(zebra) == 1
    with pytest.raises(UsageError, match="no text"):
        train_vocabulary([written(tmp_path / "b.txt", b"\n")], tmp_path / "b.model", vocab_size=300)
    many = written(tmp_path / "c.txt", "\n".join(_corpus() * 20).encode())
    train_vocabulary([many], tmp_path / "c.model", vocab_size=400, max_bytes=20_000)
    assert Tokenizer(tokenizer_model=tmp_path / "c.model").n_words == 400


# ------------------------------------------------------------------------------- export


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
    assert b" the" in tokens and not any("\u2581".encode() in token for token in tokens)
    expected = [tokenizer.sp_model.get_score(i) for i in range(tokenizer.n_words)]
    assert np.array_equal(np.float32(scores), np.float32(expected))


# ------------------------------------------------------------------------------- command line


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
        ([*train, "--overwrite", "--vocab_size", "0"], "--vocab_size 0"),
        ([*train, "--overwrite", "--input", "absent.txt"], "--input absent.txt: no such file"),
        ([*train, "--overwrite", "--character_coverage", "2"], "--character_coverage 2.0"),
        (["train", "--input", "a.txt"], "--output"),
        (["tain"], "invalid choice"),
        ([*export, "--overwrite", "--tokenizer_model", str(corpus_file)], "not a SentencePiece"),
        ([*train[:-1], str(corpus_file / "x.model")], "cannot be"),
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
