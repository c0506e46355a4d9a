"""Several sources of a text, each an argument of --pretrain_data, as --data_weights weighs them.

Their files, their documents in the cache of all, and what is held out of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minllama.system.errors import UsageError
from minllama.system.files import real_path
from minllama.text.find_files import find_text_files
from minllama.text.stream import TokenStream, joined, split_documents
from minllama.text.token_cache import TokenCache


def files_by_argument(arguments: Sequence[str], flag: str) -> dict[str, list[Path]]:
    """The files that each argument of a flag names. Raises UsageError for a file in two of them."""
    files, owners = {}, {}
    for number, argument in enumerate(arguments):
        files[argument] = find_text_files([argument], flag=flag)
        for path in files[argument]:
            owner = owners.setdefault(real_path(path), number)
            if owner != number:
                raise UsageError(
                    f"{flag}: {path} is in {arguments[owner]} and again in {argument}: with "
                    "--data_weights a file is in one source: name it in one"
                )
    return files


def documents_by_source(
    cache: TokenCache, sources: dict[str, int], chosen: np.ndarray | None
) -> dict[str, np.ndarray]:
    """(documents,) bool for each source: those that are its own, of the chosen ones.

    `sources` has the number of each one's files, which are in the cache one after the other.
    """
    stops = np.cumsum([0, *cache.file_documents])[np.cumsum([0, *sources.values()])]
    numbers = np.arange(len(cache.document_starts))
    documents = {}
    for name, (first, stop) in zip(sources, itertools.pairwise(stops), strict=True):
        documents[name] = (first <= numbers) & (numbers < stop)
        if chosen is not None:
            documents[name] &= chosen
    return documents


def split_sources(
    cache: TokenCache, documents: dict[str, np.ndarray], val_fraction: float, length: int
) -> tuple[TokenStream, dict[str, int], TokenStream | None, dict[str, int]]:
    """The text to train on and the held-out text, each with the tokens of its sources in order.

    Of each source about `val_fraction` is held out. Raises UsageError for one that is too small.
    """
    train, val = {}, {}
    for name, of in documents.items():
        split = split_documents(cache, val_fraction, chunk_length=length, chosen=of)
        train[name], val[name] = split
        if len(train[name]) < length:
            raise UsageError(
                f"--pretrain_data {name}: has {len(train[name]):,} tokens to train on, fewer than "
                f"a chunk of {length:,}: give it more text, put it and another one into a folder, "
                "or give a smaller --max_seq_len"
            )
        if val_fraction and (val[name] is None or len(val[name]) < 2):
            raise UsageError(
                f"--pretrain_data {name}: its {len(train[name]):,} tokens are too few to hold some "
                "of them out: give it more text, a smaller --max_seq_len, files for --val_data, "
                "or --val_fraction 0"
            )
    sizes = {name: len(stream) for name, stream in train.items()}
    if not val_fraction:
        return joined(train.values()), sizes, None, {}
    val_sizes = {name: len(stream) for name, stream in val.items()}
    return joined(train.values()), sizes, joined(val.values()), val_sizes


def tokens_by_source(cache: TokenCache, sources: dict[str, int]) -> dict[str, int]:
    """The tokens of each source of a cache of --val_data; raises UsageError for an empty one."""
    stops = np.cumsum([0, *cache.file_tokens])[np.cumsum([0, *sources.values()])]
    sizes = dict(zip(sources, np.diff(stops).tolist(), strict=True))
    for name, size in sizes.items():
        if not size:
            raise UsageError(f"--val_data {name}: empty, there is no text to measure on")
    return sizes
