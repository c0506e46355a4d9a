"""Duplicate documents: in the text to train on, or in it and what is held out.

Two are the same where their tokens are, by their fingerprints alone: the text is not read. Near
copies, which differ in white space or in a header, share most of their stretches of letters.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minllama.cli.console import say
from minllama.system.errors import UsageError
from minllama.text.copies import HashSet
from minllama.text.spelling import SpanHashes, Spelling
from minllama.text.stream import TokenStream, documents_in
from minllama.text.token_cache import TokenCache
from tokenizer import Tokenizer


def first_occurrences(fingerprints: np.ndarray) -> np.ndarray:
    """(documents,) int64: the number of the first document that is the same as each one.

    `fingerprints` are (documents, 2) uint64, alike where documents are. Only those whose first
    halves are not unique are sorted by both, which takes twenty times as long as the search.
    """
    first = np.arange(len(fingerprints))
    halves = np.sort(fingerprints[:, 0])
    repeated = halves[1:][halves[1:] == halves[:-1]]
    if len(repeated):
        at = np.searchsorted(repeated, fingerprints[:, 0]).clip(max=len(repeated) - 1)
        candidates = np.flatnonzero(repeated[at] == fingerprints[:, 0])
        order = candidates[np.lexsort(fingerprints[candidates].T)]  # stable: the first stays first
        in_order = fingerprints[order]
        is_new = np.append(True, (in_order[1:] != in_order[:-1]).any(axis=1))
        first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first


def drop_duplicates(cache: TokenCache, val_cache: TokenCache | None) -> np.ndarray:
    """(documents,) bool: the first of each kind that --val_data has not; says what is dropped.

    Raises UsageError where that is all.
    """
    count, first = len(cache.document_starts), _first_of_both(cache, val_cache)
    held_out = np.zeros(len(first), bool)
    held_out[first[count:]] = True
    held_out = held_out[first[:count]]
    dropped = held_out | (first[:count] != np.arange(count))
    if dropped.all():
        raise UsageError("--dedup leaves nothing to train on: every document is in --val_data, too")
    why = f", {held_out.sum():,} of them held out by --val_data" if val_cache is not None else ""
    print(f"duplicates   {_share(cache, dropped)} dropped{why}")
    return ~dropped


def report_duplicates(
    cache: TokenCache, val_cache: TokenCache | None, train: TokenStream, val: TokenStream | None
) -> None:
    """Say how many documents are in the text again, and how many are in both `train` and `val`.

    `val` is of the text itself, or without --dedup the whole of --val_data.
    """
    count, first = len(cache.document_starts), _first_of_both(cache, val_cache)
    repeated = first[:count] != np.arange(count)
    if repeated.any():
        print(f"duplicates   {_share(cache, repeated)} are copies of others; --dedup drops them")
    if val is None:
        return
    if val_cache is None:
        trained, held_out = documents_in(cache, train), documents_in(cache, val)
    else:
        trained = np.arange(len(first)) < count
        held_out = ~trained
    # How often each document is trained on. One that is partly held out does not count itself.
    occurrences = np.bincount(first[trained], minlength=len(first))[first]
    shared = held_out & (occurrences > trained)
    if shared.any():
        print(
            f"shared       {shared.sum():,} of {held_out.sum():,} held-out documents are trained "
            "on, too, and flatter the validation loss; --dedup keeps them apart"
        )


def _first_of_both(cache: TokenCache, val_cache: TokenCache | None) -> np.ndarray:
    """`first_occurrences` of the documents of a text, and after them of --val_data's."""
    if val_cache is None:
        return first_occurrences(cache.fingerprints)
    return first_occurrences(np.concatenate([cache.fingerprints, val_cache.fingerprints]))


def _share(cache: TokenCache, chosen: np.ndarray) -> str:
    tokens = (cache.document_stops() - cache.document_starts)[chosen].sum()
    share = tokens / len(cache)
    return f"{chosen.sum():,} of {len(chosen):,} documents ({share:.1%} of the tokens)"


# ---------------------------------------------------------------------------- near copies

STRETCH = 64  # bytes of UTF-8 without white space, some ten words
ONE_IN = 8  # stretches is looked at, chosen by its hash
MOST = 0.7  # of a document's stretches
TRAIN_TOKENS = VAL_TOKENS = 1 << 22  # at most looked at: two seconds
READ_TOKENS = 1 << 18  # at a time


def report_near_copies(tokenizer: Tokenizer, train: TokenStream, val: TokenStream) -> None:
    """Say how many held-out documents are mostly in the text to train on, too, if any.

    And where that text is so long that only its beginning is looked at.
    """
    spelling = Spelling(tokenizer, spaces=False)
    hashes, documents = [], []
    for start, text, offsets in _letters(spelling, val, VAL_TOKENS):
        sampled, at = _stretches(text)
        ends = np.stack([at, at + STRETCH - 1])
        tokens = val.locate(start + np.searchsorted(offsets, ends, side="right") - 1)
        first, last = np.searchsorted(val.document_starts, tokens, side="right")
        hashes.append(sampled[first == last])
        documents.append(first[first == last])
    if not hashes:
        return
    held_out, document = np.concatenate(hashes), np.concatenate(documents)
    wanted = HashSet(held_out)
    is_seen = np.zeros(len(wanted.members), bool)
    for _, text, _ in _letters(spelling, train, TRAIN_TOKENS):
        is_seen[wanted.find(_stretches(text)[0])[1]] = True
    is_seen = is_seen[np.searchsorted(wanted.members, held_out)]
    sizes = np.bincount(document)
    copies = int((np.bincount(document, is_seen)[sizes > 0] >= MOST * sizes[sizes > 0]).sum())
    is_part = len(train) > TRAIN_TOKENS
    part = f"the first {TRAIN_TOKENS:,} tokens of the text" if is_part else "the text"
    if copies or is_part:
        say(
            f"near copies  {copies or 'none'} of {(sizes > 0).sum():,} held-out documents, exact "
            f"ones counted: most of each is in {part} to train on, too"
        )


def _letters(
    spelling: Spelling, stream: TokenStream, most: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(first token, letters, places among them of each token) of each part of a stream."""
    for start in range(0, min(most, len(stream)), READ_TOKENS):
        yield start, *spelling.spell(stream.read(start, min(start + READ_TOKENS, len(stream))))


def _stretches(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, places) of one in ONE_IN of the stretches of a text, (n,) uint8."""
    if len(text) < STRETCH:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    first = np.arange(len(text) - STRETCH + 1)
    hashes = SpanHashes(text).of(first, first + STRETCH)
    places = np.flatnonzero(hashes % np.uint64(ONE_IN) == 0)
    return hashes[places], places
