"""minllama/text/encoder.py: documents in parts have exactly the ids of whole documents."""

from __future__ import annotations

import copy
import functools
import io
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from byte_vocabularies import KINDS, PIECES, byte_vocabulary, tokenizer_json
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import FRAGMENTS, OTHERS, PLAIN, corpus_lines, vocabulary

from minllama.text import encoder as encoder_module
from minllama.text.documents import Block
from minllama.text.encoder import DocumentEncoder
from minllama.vocabulary.byte_bpe import pack
from minllama.vocabulary.sentence_piece import SPACE
from tokenizer import Tokenizer

REAL = ["embedded", "llama-2"]


def blocks_of(text: str, sizes: list[int]) -> list[Block]:
    """`text` in blocks of the given sizes, over and over; an empty block is its end."""
    blocks, at = [], 0
    while at < len(text):
        size = sizes[len(blocks) % len(sizes)]
        blocks.append(Block(text[at : at + size], False))
        at += size
    return [*blocks, Block("", True)]


def encode(encoder: DocumentEncoder, documents: list[str], sizes: list[int]) -> list[list[int]]:
    """The ids of each document, put together from its parts, whose bytes are counted too."""
    found, counted = [], []
    for batch in encoder.encode(block for text in documents for block in blocks_of(text, sizes)):
        for part in batch:
            assert part.ids.dtype == encoder.dtype
            if part.starts:
                found.append([])
                counted.append(0)
            found[-1] += part.ids.tolist()
            counted[-1] += part.utf8_bytes
    assert counted == [len(text.encode()) for text in documents]
    return found


@functools.cache
def encoder_of(name: str) -> DocumentEncoder:
    return DocumentEncoder(vocabulary(name))


def whole(tokenizer: Tokenizer, documents: list[str]) -> list[list[int]]:
    """What SentencePiece itself gives for whole documents."""
    return [tokenizer.sp_model.encode(text) for text in documents]


def part_sizes(encoder: DocumentEncoder, text: str, block: int = 512) -> list[int]:
    """The ids of each part of one document, counted."""
    return [len(part.ids) for batch in encoder.encode(blocks_of(text, [block])) for part in batch]


texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=40).map("".join)
settled = settings(max_examples=30, deadline=None, derandomize=True)


@pytest.mark.parametrize("name", [*PLAIN, *OTHERS, *REAL])
@settled
@given(
    documents=st.lists(texts.filter(bool), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    part_chars=st.integers(1, 6),
    batch_chars=st.sampled_from([20, 300]),
    threads=st.sampled_from([1, 2, 3]),
)
def test_the_ids_are_those_of_whole_documents(
    name: str,
    documents: list[str],
    sizes: list[int],
    part_chars: int,
    batch_chars: int,
    threads: int,
) -> None:
    """Exactness is what lets a document be larger than memory and words be remembered."""
    tokenizer = vocabulary(name)
    encoder = copy.copy(encoder_of(name))  # a new one takes long to look through 32,000 pieces
    encoder.threads, encoder.part_chars, encoder.batch_chars = threads, part_chars, batch_chars
    encoder.words = {}
    assert encode(encoder, documents, sizes) == whole(tokenizer, documents)


def random_text(pick: random.Random, length: int) -> str:
    """Prose, runs of spaces, bytes as characters, Chinese and anything else, in random shares."""
    kinds = [
        lambda: pick.choice(FRAGMENTS),
        lambda: f" {pick.choice(FRAGMENTS)}",
        lambda: pick.choice([" ", "  ", "\n", SPACE, " \n", "\n ", f"\n{SPACE}", f" {SPACE} "]),
        lambda: bytes(pick.choices(range(256), k=4)).decode("latin-1"),
        lambda: "".join(chr(pick.randrange(0x4E00, 0x9FA5)) for _ in range(3)),
        lambda: pick.choice(corpus_lines()),
        lambda: chr(pick.choice([pick.randrange(1, 0xD800), pick.randrange(0xE000, 0x110000)])),
    ]
    chosen = pick.choices(kinds, weights=[pick.random() ** 2 for _ in kinds], k=length)
    return "".join(make() for make in chosen)


@pytest.mark.parametrize("part_chars", [16, 300])
@pytest.mark.parametrize("name", [*PLAIN, *REAL])
def test_the_ids_of_longer_texts(name: str, part_chars: int) -> None:
    """The same with what words a long-lived encoder has remembered, and ids of either width."""
    tokenizer, pick = vocabulary(name), random.Random(part_chars)
    for threads, width in ((1, np.uint16), (2, np.uint32), (8, np.uint16)):
        encoder = DocumentEncoder(
            tokenizer, threads=threads, part_chars=part_chars, batch_chars=5000
        )
        encoder.dtype = np.dtype(width)
        for _ in range(8):
            documents = [random_text(pick, pick.randrange(1, 300)) for _ in range(3)]
            assert encode(encoder, documents, [pick.randrange(1, 400)]) == whole(
                tokenizer, documents
            )


@pytest.mark.parametrize("name", [*PLAIN, *OTHERS, *REAL])
def test_which_vocabularies_let_a_document_be_cut(name: str) -> None:
    """Exactness must not come from never cutting, nor speed from cutting where ids change."""
    encoder = DocumentEncoder(vocabulary(name), threads=1, part_chars=100)
    sizes = part_sizes(encoder, " ".join(corpus_lines()), 64)
    assert encoder.looks_up == (name not in OTHERS)
    cut = encoder.looks_up or name == "no-dummy-prefix"
    assert (len(sizes) > 100 and max(sizes) < 400) == cut
    assert (len(sizes) == 1) == (not cut)


def test_a_text_without_a_cut_is_read_in_linear_time() -> None:
    """A long line without spaces was once joined again for every block of it."""
    encoder = DocumentEncoder(vocabulary("ours"), threads=1, part_chars=100)
    start = time.process_time()
    assert part_sizes(encoder, "a" * 100_000, 10) == [100_000]
    assert time.process_time() - start < 2  # 0.04 s, and quadratic 20 s


def test_a_long_real_text(real_data: Path) -> None:
    """Reviews in one document, under Llama-2's vocabulary and one that is not plain BPE.

    Of a unigram vocabulary all the text before counts: a cut that no piece spans changes ids.
    """
    model = io.BytesIO()
    lines = (real_data / "sst-train.txt").read_text(encoding="utf-8").split("\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines[:1000]),
        model_writer=model,
        vocab_size=500,
        model_type="unigram",
        minloglevel=2,
    )
    text = (real_data / "cfimdb-train.txt").read_text(encoding="utf-8")[:100_000]
    for tokenizer in (Tokenizer(tokenizer_model=model.getvalue()), vocabulary("llama-2")):
        encoder = DocumentEncoder(tokenizer, threads=2, part_chars=1000, batch_chars=20_000)
        assert encode(encoder, [text], [4096]) == whole(tokenizer, [text])


def test_threads_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With three threads or more SentencePiece once got all, the remembered words nothing."""
    tokenizer, shares = vocabulary("ours"), {"_look_up": 0, "_encode_parts": 0}
    for name in shares:
        real = getattr(DocumentEncoder, name)

        def counted(self, parts, *rest, name=name, real=real):
            shares[name] += len(parts)
            return real(self, parts, *rest)

        monkeypatch.setattr(DocumentEncoder, name, counted)
    encoder = DocumentEncoder(tokenizer, threads=8, part_chars=50, batch_chars=2000)
    documents = ["".join(corpus_lines())]
    assert encode(encoder, documents, [4096]) == whole(tokenizer, documents)
    assert min(shares.values()) > 0


def test_remembered_words_stay_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are forgotten when there are too many or they are long, and the ids stay right."""
    monkeypatch.setattr(encoder_module, "WORD_CACHE_ENTRIES", 50)
    monkeypatch.setattr(encoder_module, "WORD_CACHE_CHARS", 5)
    tokenizer = vocabulary("ours")
    encoder = DocumentEncoder(tokenizer, threads=1, batch_chars=200)
    documents = [f"{line} {number}" for number, line in enumerate(corpus_lines())]
    assert encode(encoder, documents, [1000]) == whole(tokenizer, documents)
    assert len(encoder.words) <= 50 and max(map(len, encoder.words)) <= 5


# ---------------------------------------------------------------------------- byte-level BPE

CUTTABLE = [
    *("letters words it's DON'T I'll", "², Ⅷ ½ 12345 x9 9x", "a\nb", "a.\nB", "a_\nb", "?\n\nx"),
    *("世界。\n天", "“x”\ny", "e\u0301 e\u0301\ne", "\u1112\u1161 \u11ab", "ſ ß", "'s 't"),
    "हिन्दी\nहि",
    "\r\nx",
]  # fmt: skip
byte_texts = st.lists(
    st.sampled_from([*PIECES, *CUTTABLE, " a", " the", "\nThe"]) | st.text(max_size=4), max_size=40
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    documents=st.lists(byte_texts.filter(bool), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    part_chars=st.integers(1, 6),
    batch_chars=st.sampled_from([20, 300]),
)
def test_the_ids_of_byte_level_bpe_are_those_of_whole_documents(
    kind: str, documents: list[str], sizes: list[int], part_chars: int, batch_chars: int
) -> None:
    """By `tokenizers` itself, for each way to cut a text into words."""
    tokenizer = byte_vocabulary(kind)
    encoder = DocumentEncoder(tokenizer, part_chars=part_chars, batch_chars=batch_chars)
    engine = tokenizer.vocabulary.engine
    wanted = [engine.encode(text, add_special_tokens=False).ids for text in documents]
    assert encode(encoder, documents, sizes) == wanted


@pytest.mark.parametrize("share", [8, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_character_at_a_cut(kind: str, share: int) -> None:
    """Where the rule for cuts may take it for a letter; of the many beyond Hangul every 20th.

    Of them all in the soak; else an eighth for each kind, of each another, and ASCII.
    """
    tokenizer = byte_vocabulary(kind)
    codes = [*range(0x3100), *range(0x3100, 0xD800, 20), *range(0xE000, 0x30000, 20)]
    characters = [chr(code) for code in [*range(0x80), *codes[[*KINDS].index(kind) :: share]]]
    for start in range(0, len(characters), 1000):
        text = "".join(
            f"{c} a{c} {c}b.\n{c}{c}\nx {c}1{c}\n1" for c in characters[start : start + 1000]
        )
        encoder = DocumentEncoder(tokenizer, part_chars=1)
        whole = tokenizer.vocabulary.encode(text)
        assert encode(encoder, [text], [4000]) == [whole]


@pytest.mark.parametrize("kind", KINDS)
def test_byte_level_bpe_lets_a_document_be_cut(kind: str) -> None:
    """And not where a token that is searched for looks at, or takes, what is around it."""
    encoder = DocumentEncoder(byte_vocabulary(kind), part_chars=100)
    sizes = part_sizes(encoder, " ".join(corpus_lines()), 64)
    assert len(sizes) > 100 and max(sizes) < 400
    file = json.loads(tokenizer_json(kind))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {"id": len(byte_vocabulary(kind).vocabulary.names), "special": False, **flags}
    around = [{key: True} for key in ("lstrip", "rstrip", "single_word")]
    for change in ({"content": "the cat"}, *around):
        token = added | {"content": "<x>"} | change
        changed = file | {"added_tokens": [*file["added_tokens"], token]}
        tokenizer = Tokenizer(pack(changed, KINDS[kind][2], "x"))
        assert tokenizer.vocabulary.cut is None
        assert len(part_sizes(DocumentEncoder(tokenizer, part_chars=100), "a b " * 300, 64)) == 1
    fine = file | {"added_tokens": [*file["added_tokens"], added | {"content": "<x>"}]}
    assert Tokenizer(pack(fine, KINDS[kind][2], "x")).vocabulary.cut is not None


def test_composed_characters_at_a_cut() -> None:
    """Qwen's vocabulary composes a text (NFC) first: no cut parts what belongs together."""
    file = json.loads(tokenizer_json("qwen2")) | {"normalizer": {"type": "NFC"}}
    tokenizer, pick = Tokenizer(pack(file, KINDS["qwen2"][2], "x")), random.Random(5)
    assert tokenizer.vocabulary.encode("e\u0301") == tokenizer.vocabulary.encode("é")
    pieces = ["e\u0301", " a\u0301", "x\ne\u0301", "\u1112\u1161\u11ab", " \u1112", "\nA\u030a"]
    pieces += ["가", "\n\u0301a", " \u0301b", "a", " ", "\u11ab"]
    for _ in range(200):
        text = "".join(pick.choices(pieces, k=20))
        encoder = DocumentEncoder(tokenizer, part_chars=1)
        assert encode(encoder, [text], [5]) == [tokenizer.vocabulary.encode(text)]
