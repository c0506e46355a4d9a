"""minllama/text/copies.py: what stands in a text word for word, counted again by brute force."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from brute_force import check, stretches, texts_of

from minllama.inference.copying import Original
from minllama.text import copies
from minllama.text.copies import LENGTHS, Copies, Words, has_spaces
from minllama.text.reading import Reading
from minllama.text.stream import TokenStream, split_documents, whole_stream
from minllama.text.token_cache import TokenCache, build_or_load
from tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("empty_folder")
PHRASES = [
    " ".join(f"w{random.Random(i).randrange(99)}{'é' * (i % 2)}" for i in range(k, k + 11))
    for k in range(0, 300, 11)
]


def documents(seed: int, count: int, *, joint: str = " ") -> list[str]:
    """Texts of phrases that come again and again, between words that do not."""
    draw = random.Random(seed)
    texts = []
    for _ in range(count):
        parts = [draw.choice([*PHRASES, f"x{draw.random()}"]) for _ in range(draw.randrange(1, 9))]
        texts.append(draw.choice([" ", "\n", "  "]).join(parts).replace(" ", joint))
    return texts


def cached(texts: list[str], name: str = "text.jsonl") -> TokenCache:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    Path(name).write_text(lines, encoding="utf-8")
    return build_or_load([Path(name)], Tokenizer(), Reading(), Path("cache"))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("joint", [" ", ""])
def test_the_shares_are_those_of_brute_force(seed, joint, monkeypatch):
    """In parts of a few tokens as in one; with spaces, and by characters where there are none."""
    monkeypatch.setattr(copies, "READ_TOKENS", 300 + 7 * seed)
    monkeypatch.setattr(copies, "OVERLAP", 250)
    cache, spaced = cached(documents(seed, 60, joint=joint)), joint == " "
    train, val = split_documents(cache, 0.2, chunk_length=64)
    original = Original(cache, [Path("text.jsonl")], train, Tokenizer())
    assert original.spaced == spaced
    written = documents(seed + 100, 12, joint=joint)
    with monkeypatch.context() as patch:
        patch.setattr(copies, "READ_TOKENS", 1 << 18)
        held_out = [p.words for p in copies.parts_of(val, original.spelling, spaced=spaced)]
    words = [original.words(text.encode()) for text in written]
    _, found = original.search(words, held_out)
    assert found.written[8][0] and found.longest  # there is something to find
    check(written, texts_of(val), texts_of(train), found, spaced=spaced)


def test_the_longest_is_quoted_with_its_place():
    """File, document of the file, byte of the document: there it can be read."""
    texts, others = documents(1, 30), documents(2, 30)
    cached(others, "a.jsonl")
    cached(texts, "b.jsonl")
    files = [Path("a.jsonl"), Path("b.jsonl")]
    cache = build_or_load(files, Tokenizer(), Reading(), Path("cache"))
    secret = "the one sentence that stands here and nowhere else at all"
    texts[17] = f"Some words, é, before it {secret} and after"
    cached(texts, "b.jsonl")
    cache = build_or_load(files, Tokenizer(), Reading(), Path("cache"))
    original = Original(cache, files, whole_stream(cache), Tokenizer())
    _, found = original.search([original.words(f"x {secret} y".encode())])
    assert (found.longest, found.quote) == (11, secret)
    where = len(texts[17].partition(secret)[0].encode())
    assert found.place == f"b.jsonl, document 18, near byte {where}"
    assert f'longest: 11 words: "{secret}" (b.jsonl, document 18' in "\n".join(found.lines("it"))


def test_no_stretch_crosses_a_documents_end():
    """Two documents of which one ends as the other begins are not one text."""
    first, second = "a b c d e f", "g h i j k l"
    cache = cached([first, second, f"{first} {second[:7]}"])
    original = Original(cache, [Path("text.jsonl")], whole_stream(cache), Tokenizer())
    _, found = original.search([original.words(f"{first} {second}".encode())])
    assert found.written[8] == (3, 5) and found.longest == 10


def test_what_is_too_short_copies_nothing():
    """A text of seven words has no stretch of eight, and its share is none, not 0."""
    cache = cached(["one two three four five six seven"])
    original = Original(cache, [Path("text.jsonl")], whole_stream(cache), Tokenizer())
    for text in (b"", b"one two three four five six seven"):
        _, found = original.search([original.words(text)])
        assert found.share(8) is None and not found.longest and not found.is_recited
        assert found.rows()[0] == ("8 words in a row", "none (0 of 0)")


def test_only_a_part_of_a_long_text_is_looked_at_and_said():
    """Under --minutes, whose time it takes."""
    cache = cached(documents(3, 80))
    stream, files = whole_stream(cache), [Path("text.jsonl")]
    original = Original(cache, files, stream, Tokenizer(), most=500)
    found = original.search([original.words(b"x")])[1]
    assert found.looked_at == 500 and "the first 500 tokens" in found.rows()[-1][1]
    first = TokenStream(cache.tokens, np.array([0]), np.array([500]))
    kept, whole = texts_of(first), texts_of(stream)
    written = [text for text in whole if len(text.split()) > 8]
    found = original.search([original.words(text.encode()) for text in written])[1]
    kept[-1] = kept[-1].rsplit(None, 1)[0]  # its last word may be half a one
    known = {s for text in kept for s in stretches(text, 8, spaced=True)}
    wanted = [s for text in written for s in stretches(text, 8, spaced=True)]
    assert found.written[8] == (sum(s in known for s in wanted), len(wanted))


def test_words_of_bytes():
    """As bytes.split has them, or characters; a break ends a word that goes on."""
    text = "ab  c\n 很好 d".encode()
    data = np.frombuffer(text, np.uint8)
    spaced, single = (Words.of(data, [1], spaced=s) for s in (True, False))
    cut = [text[i:j].decode() for i, j in zip(spaced.starts, spaced.stops, strict=True)]
    assert cut == ["a", "b", "c", "很好", "d"]
    cut = [text[i:j].decode() for i, j in zip(single.starts, single.stops, strict=True)]
    assert cut == ["a", "b", "c", "很", "好", "d"]


@pytest.mark.parametrize(
    "text, spaced",
    [("These are words .", True), ("这些是文字，没有空格的。" * 3, False), ("", True)],
)
def test_scripts_without_spaces_are_counted_in_characters(text, spaced):
    """A whole line of Chinese was one word, and no stretch of eight of them was ever copied."""
    assert has_spaces(text.encode()) == spaced


COPIES = Copies(
    "words", {8: (5, 10), 16: (3, 9), 32: (0, 8)}, dict.fromkeys(LENGTHS, (1, 90)), 9, "a b", "f"
)


def test_it_is_the_same_from_json():
    """As run.json keeps it."""
    assert Copies.from_plain(json.loads(json.dumps(COPIES.to_plain()))) == COPIES


@pytest.mark.parametrize(
    "change",
    [
        {"written_8": [11, 10]}, {"written_8": [1]}, {"written_8": "ab"}, {"written_8": [True, 2]},
        {"held_out_16": [0.5, 2]}, {"longest": "9"}, {"quote": None}, {"looked_at": [1]},
    ],
)  # fmt: skip
def test_a_damaged_record_is_none(change):
    """The page and the table of runs read what may be anybody's."""
    assert Copies.from_plain(COPIES.to_plain() | change) is None
    for key in COPIES.to_plain():
        plain = COPIES.to_plain()
        del plain[key]
        assert Copies.from_plain(plain) is None
    assert Copies.from_plain([]) is Copies.from_plain(None) is None


def test_by_heart_is_far_more_than_other_text_has_in_common():
    """Licences and refrains stand in held-out text, too."""
    assert COPIES.is_recited
    same = Copies("words", COPIES.written, COPIES.written)
    assert not same.is_recited


def test_the_line_of_a_text_without_spaces_ends_in_its_colon():
    """It read "character for character: (its script has no spaces)"."""
    none = dict.fromkeys(LENGTHS, (0, 9))
    head = Copies("characters", none, none).lines("20 texts")[0]
    assert head.endswith("character for character (its script has no spaces):")
    assert Copies("words", none, none).lines("20 texts")[0].endswith("word for word:")
