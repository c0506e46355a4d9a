"""Runs without what takes most of a small one and is of no use in it: timing, counting copies."""

from __future__ import annotations

import contextlib
import functools
from unittest import mock

from minllama.text.copies import LENGTHS, Copies
from minllama.training import loop, pretraining, setup
from minllama.training.fitting import Speed
from tokenizer import Tokenizer

FITS_REVIEWS = pretraining.fits_reviews
NO_COPIES = Copies("words", dict.fromkeys(LENGTHS, (0, 9)), dict.fromkeys(LENGTHS, (1, 99)))
STUBS = (
    (loop, "peak_flops", lambda *_: 1e9),
    (setup, "measure", lambda *_, **__: Speed(1e-5, 1e-3)),
    (pretraining, "fits_reviews", lambda tokenizer: _fits(tokenizer.model_bytes)),
    (pretraining, "measure_copies", lambda *_: (NO_COPIES, [])),
    (pretraining, "measure_repeats", lambda *_: []),
)


@functools.cache
def _fits(vocabulary: bytes) -> bool:
    """Whether a vocabulary fits the reviews: the same after every run."""
    return FITS_REVIEWS(Tokenizer(tokenizer_model=vocabulary))


def hurry() -> None:
    """From now on, in this process."""
    for stub in STUBS:
        setattr(*stub)


def hurried() -> contextlib.ExitStack:
    """Within the block."""
    stack = contextlib.ExitStack()
    for stub in STUBS:
        stack.enter_context(mock.patch.object(*stub))
    return stack
