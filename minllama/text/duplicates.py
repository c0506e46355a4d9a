"""Documents that come twice: in the text to train on, or in it and what is held out.

Two are the same where their tokens are; they are told by fingerprints, without reading the text.
"""

from __future__ import annotations

import numpy as np

from minllama.system.errors import UsageError
from minllama.text.token_cache import TokenCache
from utils import TokenStream, documents_in


def first_alike(fingerprints: np.ndarray) -> np.ndarray:
    """(documents,) int64: the number of the first document that is the same as each one.

    `fingerprints` are (documents, 2) uint64, alike where documents are. Only those whose first
    halves come twice are put in order by both, which takes twenty times as long as the search.
    """
    first = np.arange(len(fingerprints))
    halves = np.sort(fingerprints[:, 0])
    again = halves[1:][halves[1:] == halves[:-1]]
    if len(again):
        at = np.searchsorted(again, fingerprints[:, 0]).clip(max=len(again) - 1)
        found = np.flatnonzero(again[at] == fingerprints[:, 0])
        order = found[np.lexsort(fingerprints[found].T)]  # stable: the first of the same is first
        ordered = fingerprints[order]
        new = np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1))
        first[order] = order[new][np.cumsum(new) - 1]
    return first


def _first_alike(cache: TokenCache, val_cache: TokenCache | None) -> np.ndarray:
    """That of the documents of a text, and after them of --val_data's."""
    if val_cache is None:
        return first_alike(cache.fingerprints)
    return first_alike(np.concatenate([cache.fingerprints, val_cache.fingerprints]))


def _documents(cache: TokenCache, some: np.ndarray) -> str:
    """How many of a text's documents those are, and how much of it."""
    tokens = (cache.document_stops() - cache.document_starts)[some].sum()
    return f"{some.sum():,} of {len(some):,} documents ({tokens / len(cache):.1%} of the tokens)"


def without_copies(cache: TokenCache, val_cache: TokenCache | None) -> np.ndarray:
    """(documents,) bool: the first of each kind that --val_data has not; says what is dropped.

    Raises UsageError where that is all.
    """
    count, first = len(cache.document_starts), _first_alike(cache, val_cache)
    held_out = np.zeros(len(first), bool)
    held_out[first[count:]] = True
    held_out = held_out[first[:count]]
    dropped = held_out | (first[:count] != np.arange(count))
    if dropped.all():
        raise UsageError("--dedup leaves nothing to train on: every document is in --val_data, too")
    why = f", {held_out.sum():,} of them held out by --val_data" if val_cache is not None else ""
    print(f"duplicates   {_documents(cache, dropped)} dropped{why}")
    return ~dropped


def say_copies(
    cache: TokenCache, val_cache: TokenCache | None, train: TokenStream, val: TokenStream | None
) -> None:
    """Say how many documents come twice in the text, and are in both of `train` and `val`.

    `val` is of the text itself, or without --dedup the whole of --val_data.
    """
    count, first = len(cache.document_starts), _first_alike(cache, val_cache)
    again = first[:count] != np.arange(count)
    if again.any():
        print(f"duplicates   {_documents(cache, again)} are copies of others; --dedup drops them")
    if val is None:
        return
    if val_cache is None:
        trained, held_out = documents_in(cache, train), documents_in(cache, val)
    else:
        trained = np.arange(len(first)) < count
        held_out = ~trained
    like_it = np.bincount(first[trained], minlength=len(first))[first]
    shared = held_out & (like_it > trained)  # itself, where it is partly held out, is none
    if shared.any():
        print(
            f"shared       {shared.sum():,} of {held_out.sum():,} held-out documents are trained "
            "on, too, and flatter the validation loss; --dedup keeps them apart"
        )
