"""A text's tokens as a stream, whole or in part, and which documents are held out of training.

Knows token arrays and where documents start in them; nothing of chunks, batches or models.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from minllama.text.token_cache import StoredTokens, TokenCache

MAX_BLOCKS = 16  # of a long document held out
MIN_SHARE = 0.1  # of what was asked for, that whole documents have to come to

# ---------------------------------------------------------------------------- streams


@dataclass(eq=False)
class TokenStream:
    """Stretches of a token array, from `starts` to `stops`, read as one without a copy of all."""

    tokens: np.ndarray | StoredTokens
    starts: np.ndarray
    stops: np.ndarray
    document_starts: np.ndarray | None = None  # in the token array, rising; None: not known

    def __post_init__(self) -> None:
        # Where each stretch begins in the stream, and the length of all.
        self.offsets = np.concatenate([[0], np.cumsum(self.stops - self.starts)])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 of the stream, (stop - start,)."""
        stretch, pieces = self._stretch(start), []
        while start < stop:
            at = int(self.starts[stretch]) + start - int(self.offsets[stretch])
            count = min(stop, int(self.offsets[stretch + 1])) - start
            pieces.append(self.tokens[at : at + count])
            start, stretch = start + count, stretch + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([self.tokens[:0], *pieces])

    def select(self, ranges: Iterable[tuple[int, int]]) -> TokenStream:
        """Tokens start..stop-1 of each range, one after the other, as a stream."""
        sizes = self.stops - self.starts
        starts, stops = [], []
        for start, stop in ranges:
            low = (start - self.offsets[:-1]).clip(0, sizes)
            high = (stop - self.offsets[:-1]).clip(0, sizes)
            kept = high > low
            starts.append((self.starts + low)[kept])
            stops.append((self.starts + high)[kept])
        bounds = np.concatenate(starts), np.concatenate(stops)
        return TokenStream(self.tokens, *bounds, self.document_starts)

    def locate(self, position):
        """The place in the token array of token `position` of the stream; of an array of each."""
        stretch = self._stretch(position)
        return self.starts[stretch] + position - self.offsets[stretch]

    def count_documents(self, starts: np.ndarray, stops: np.ndarray) -> int:
        """How many documents start at tokens starts..stops-1 of the stream, all of them together.

        From `document_starts` alone: nothing is read.
        """
        return int((self._documents_before(stops) - self._documents_before(starts)).sum())

    def _documents_before(self, positions: np.ndarray) -> np.ndarray:
        stretch = self._stretch(positions).clip(0, len(self.starts) - 1)  # the end is in none
        places = self.starts[stretch] + positions - self.offsets[stretch]
        first, last = np.searchsorted(self.document_starts, (self.starts[stretch], places))
        return self._documents_before_stretch[stretch] + last - first

    @functools.cached_property
    def _documents_before_stretch(self) -> np.ndarray:
        first, last = np.searchsorted(self.document_starts, (self.starts, self.stops))
        return np.concatenate([[0], np.cumsum(last - first)])

    def _stretch(self, position):  # a number, or an array of them
        return np.searchsorted(self.offsets, position, side="right") - 1


def joined(streams: Iterable[TokenStream]) -> TokenStream:
    """The stretches of streams of the same tokens as one stream, in the order of the array."""
    streams = [*streams]
    starts = np.concatenate([stream.starts for stream in streams])
    stops = np.concatenate([stream.stops for stream in streams])
    order = np.argsort(starts, kind="stable")
    return TokenStream(streams[0].tokens, starts[order], stops[order], streams[0].document_starts)


def documents_in(cache: TokenCache, stream: TokenStream) -> np.ndarray:
    """(documents,) bool: those of the cache of which the stream has at least a part."""
    at = np.searchsorted(stream.stops, cache.document_starts, side="right")
    starts = np.append(stream.starts, len(cache))
    return starts[at] < cache.document_stops()


def whole_stream(cache: TokenCache, chosen: np.ndarray | None = None) -> TokenStream:
    """The chosen documents of a cache, (documents,) bool, by default all, as validation is read."""
    if chosen is None:
        chosen = np.ones(len(cache.document_starts), bool)
    # Neighbours make one stretch: of a million documents there are few.
    edges = np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8))
    first, last = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1
    starts, stops = cache.document_starts[first], cache.document_stops()[last]
    return TokenStream(cache.tokens, starts, stops, cache.document_starts)


# ---------------------------------------------------------------------------- holding out


def split_documents(
    cache: TokenCache, val_fraction: float, *, chunk_length: int, chosen: np.ndarray | None = None
) -> tuple[TokenStream, TokenStream | None]:
    """(train, val): whole documents are held out, those whose content's hash is low.

    Of the `chosen` documents, (documents,) bool, by default all, about `val_fraction` of the tokens
    is held out. Where most of the text is in documents that are larger than that, blocks of chunks
    all over these are, at least one, and as large a share of the others; where the documents come
    to next to nothing, blocks all over the text. val is None for a fraction of 0 and for a corpus
    too small to spare anything.
    """
    if chosen is None:
        chosen = np.ones(len(cache.document_starts), bool)
    whole = whole_stream(cache, chosen)
    if val_fraction <= 0:
        return whole, None
    sizes = cache.document_stops() - cache.document_starts
    small = chosen & (sizes <= val_fraction * len(whole))  # a huge one must not be the whole of it
    in_small = int(sizes[small].sum())
    if 0 < 2 * in_small < len(whole):
        large = whole_stream(cache, chosen & ~small)
        length = min(chunk_length, max(1, round(val_fraction * len(large))))
        train, val = _split_blocks(large, val_fraction, length)
        if val is not None:
            held_out = _lowest_hashes(cache, small, val_fraction, in_small)
            return (
                joined([train, whole_stream(cache, small & ~held_out)]),
                joined([val, whole_stream(cache, held_out)]),
            )
    held_out = _lowest_hashes(cache, small, val_fraction, len(whole))
    if sizes[held_out].sum() < MIN_SHARE * val_fraction * len(whole):
        return _split_blocks(whole, val_fraction, chunk_length)
    return whole_stream(cache, chosen & ~held_out), whole_stream(cache, held_out)


def _lowest_hashes(
    cache: TokenCache, documents: np.ndarray, fraction: float, tokens: int
) -> np.ndarray:
    """(documents,) bool: those of `documents` to hold out for about a `fraction` of `tokens`.

    By content, not by number: text that is added later moves hardly a document from one side to the
    other, and copies of one are on the same side. Where the hashes give less than half or more than
    twice of what is wanted, as of few documents, they are the lowest up to it.
    """
    sizes = cache.document_stops() - cache.document_starts
    hashes = splitmix64(cache.fingerprints[:, 0])
    lowest = documents & (hashes < np.uint64(fraction * 2.0**64))
    target = fraction * tokens
    most = min(2 * target, (target + tokens) / 2)  # something is left to train on
    if target / 2 <= sizes[lowest].sum() <= most:
        return lowest
    order = np.flatnonzero(documents)[np.argsort(hashes[documents], kind="stable")]
    end = np.searchsorted(np.cumsum(sizes[order]), target, side="right")
    if end < len(order):  # not between copies
        end = np.searchsorted(hashes[order], hashes[order[end]])
    lowest = np.zeros(len(sizes), bool)
    lowest[order[:end]] = True
    return lowest


def splitmix64(x: np.ndarray) -> np.ndarray:
    """A hash of each number of x, uint64 (Steele, Lea and Flood 2014)."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _split_blocks(
    whole: TokenStream, val_fraction: float, chunk_length: int
) -> tuple[TokenStream, TokenStream | None]:
    """Hold out blocks of whole chunks, each at the end of an equal share of the stream.

    One block at the very end would be of another chapter than all that is trained on.
    """
    chunks = -(-len(whole) // chunk_length)
    held_out = min(chunks - 1, max(1, round(chunks * val_fraction)))
    blocks = min(held_out, MAX_BLOCKS)
    train, val, at = [], [], 0
    for share in range(1, blocks + 1):
        end = round(chunks * share / blocks)
        size = held_out * share // blocks - held_out * (share - 1) // blocks
        start, stop = (end - size) * chunk_length, min(end * chunk_length, len(whole))
        if held_out == 1 < chunks - 1:  # the last chunk may be of a few tokens
            start = min(start, stop - chunk_length // 2)
        train.append((at, start))
        val.append((start, stop))
        at = stop
    # No chunk to spare, or a single token: nothing to predict.
    if sum(stop - start for start, stop in val) < 2:
        return whole, None
    return whole.select(train), whole.select(val)
