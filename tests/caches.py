"""Token caches that no file is behind."""

from __future__ import annotations

import hashlib

import numpy as np

from minllama.text.token_cache import TokenCache


def fake_cache(sizes: list[int]) -> TokenCache:
    """A cache of documents of given sizes, whose token i is i."""
    cache = TokenCache.__new__(TokenCache)
    cache.tokens = np.arange(sum(sizes), dtype=np.uint32)
    cache.document_starts = np.cumsum([0, *sizes])[:-1]
    cache.document_bytes = np.array(sizes) * 3
    contents = [(start, size) for start, size in zip(cache.document_starts, sizes, strict=True)]
    digests = [hashlib.blake2b(repr(c).encode(), digest_size=16).digest() for c in contents]
    cache.fingerprints = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
    return cache
