"""What stands in a text word for word, counted without tokens, bytes or hashes."""

from __future__ import annotations

import numpy as np

from minllama.text.copies import LENGTHS, Copies
from minllama.text.stream import TokenStream
from tokenizer import Tokenizer


def words_of(text: str, *, spaced: bool) -> list[str]:
    """By the text itself: its words, or characters."""
    return text.split() if spaced else [*"".join(text.split())]


def stretches(text: str, length: int, *, spaced: bool) -> list[tuple[str, ...]]:
    """Every stretch of so many words."""
    words = words_of(text, spaced=spaced)
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]


def texts_of(stream: TokenStream) -> list[str]:
    """What the stretches of a stream spell, document by document."""
    tokenizer, texts = Tokenizer(), []
    for start, stop in zip(stream.starts, stream.stops, strict=True):
        ids = stream.tokens[start:stop]
        parts = np.split(ids, np.flatnonzero(ids == tokenizer.bos_id))
        texts += [tokenizer.decode(part.tolist()) for part in parts]
    return texts


def longest_common(some: list[str], others: list[str], *, spaced: bool) -> int:
    """How many words the longest stretch has that is in both."""

    def joined(words: list[str]) -> str:
        return f" {' '.join(words)} "

    known, longest = "\n".join(joined(words_of(text, spaced=spaced)) for text in others), 0
    for words in (words_of(text, spaced=spaced) for text in some):
        for i in range(len(words)):
            while i + longest < len(words) and joined(words[i : i + longest + 1]) in known:
                longest += 1
    return longest


def check(written: list[str], val: list[str], train: list[str], found: Copies, *, spaced) -> None:
    """Every figure, counted again without tokens, bytes or hashes."""
    for length in LENGTHS:
        known = {s for text in train for s in stretches(text, length, spaced=spaced)}
        for texts, counts in ((written, found.written), (val, found.held_out)):
            wanted = [s for text in texts for s in stretches(text, length, spaced=spaced)]
            assert counts[length] == (sum(s in known for s in wanted), len(wanted))
    longest = longest_common(written, train, spaced=spaced)
    assert found.longest == (longest if longest >= LENGTHS[0] else 0)
