"""Tokens as the bytes that they spell, and hashes of spans of them."""

from __future__ import annotations

import functools

import numpy as np

from minllama.text.stream import splitmix64
from tokenizer import Tokenizer

# A polynomial's base modulo 2**64: odd, so that it has an inverse.
BASE = 0x9E3779B97F4A7C15


class Spelling:
    """The bytes of UTF-8 that token ids spell, with or without white space."""

    def __init__(self, tokenizer: Tokenizer, *, spaces: bool) -> None:
        self.bos_id = tokenizer.bos_id
        texts = tokenizer.vocabulary.token_texts
        if not spaces:
            texts = [b"".join(text.split()) for text in texts]
        self.sizes = np.array([len(text) for text in texts])
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.bytes = np.frombuffer(b"".join(texts), np.uint8)

    def spell(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(text, offsets) of ids (n,): bytes, uint8; where among them each token begins, (n,)."""
        sizes = self.sizes[ids]
        offsets = np.cumsum(sizes) - sizes
        places = np.repeat(self.starts[ids] - offsets, sizes) + np.arange(sizes.sum())
        return self.bytes[places], offsets


@functools.lru_cache(maxsize=4)
def _powers(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The first 2**bits powers of BASE, and of its inverse."""
    bases = (BASE, pow(BASE, -1, 2**64))
    return tuple(np.cumprod(np.full(1 << bits, base, np.uint64)) for base in bases)


class SpanHashes:
    """Hashes of any spans of a sequence of numbers, each in the same time whatever its length.

    Rabin and Karp's: sum of number x BASE**place over a span, divided by the power at its start.
    """

    def __init__(self, numbers: np.ndarray) -> None:
        powers, self.inverses = _powers(len(numbers).bit_length())
        self.sums = np.zeros(len(numbers) + 1, np.uint64)
        np.cumsum(numbers * powers[: len(numbers)], out=self.sums[1:])

    def of(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """(n,) uint64: the hashes of numbers starts..stops-1, none of them empty."""
        return splitmix64((self.sums[stops] - self.sums[starts]) * self.inverses[starts])
