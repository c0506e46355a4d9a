"""What stands in a text word for word, counted without tokens, bytes or hashes."""

from __future__ import annotations

import numpy as np

from minllama.text.copies import LENGTHS, Copies
from minllama.text.stream import TokenStream
from tokenizer import Tokenizer


def stretches(text: str, length: int, *, spaced: bool) -> list[tuple[str, ...]]:
    """By the text itself: every stretch of so many words, or characters."""
    words = text.split() if spaced else [*"".join(text.split())]
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]


def texts_of(stream: TokenStream) -> list[str]:
    """What the stretches of a stream spell, document by document."""
    tokenizer, texts = Tokenizer(), []
    for start, stop in zip(stream.starts, stream.stops, strict=True):
        ids = stream.tokens[start:stop]
        parts = np.split(ids, np.flatnonzero(ids == tokenizer.bos_id))
        texts += [tokenizer.decode(part.tolist()) for part in parts]
    return texts


def common(some: list[str], others: list[str], length: int, *, spaced: bool) -> set:
    """The stretches of a length that are in both."""
    both = [
        {s for text in t for s in stretches(text, length, spaced=spaced)} for t in (some, others)
    ]
    return both[0] & both[1]


def check(written: list[str], val: list[str], train: list[str], found: Copies, *, spaced) -> None:
    """Every figure, counted again without tokens, bytes or hashes."""
    for length in LENGTHS:
        known = {s for text in train for s in stretches(text, length, spaced=spaced)}
        for texts, counts in ((written, found.written), (val, found.held_out)):
            wanted = [s for text in texts for s in stretches(text, length, spaced=spaced)]
            assert counts[length] == (sum(s in known for s in wanted), len(wanted))
    longest = 0
    while common(written, train, longest + 1, spaced=spaced):
        longest += 1
    assert found.longest == (longest if longest >= LENGTHS[0] else 0)
