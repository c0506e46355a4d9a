"""How long it takes to look for copies in a text, and how much memory: by its size.

    python benchmarks/copying.py TEXT [--sizes 8 100 1000]

A text of so many MB is the given one again and again, read from its token cache.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minllama.inference.copying import WRITTEN, Original, spread_out  # noqa: E402
from minllama.text.copies import parts_of  # noqa: E402
from minllama.text.reading import Reading  # noqa: E402
from minllama.text.stream import TokenStream, split_documents  # noqa: E402
from minllama.text.token_cache import build_or_load  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


class Repeated:
    """The tokens of a stream again and again, `count` of them, without a copy in memory."""

    def __init__(self, stream: TokenStream, count: int) -> None:
        self.stream, self.count = stream, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.count)
        pieces, size = [], len(self.stream)
        while start < stop:
            at = start % size
            pieces.append(self.stream.read(at, min(size, at + stop - start)))
            start += len(pieces[-1])
        return np.concatenate(pieces) if pieces else self.stream.read(0, 1)[:0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--sizes", type=float, nargs="+", default=[8, 100, 1000], help="in MB")
    args = parser.parse_args()
    tokenizer = Tokenizer()
    cache = build_or_load([args.text], tokenizer, Reading(), Path("token_cache"))
    train, val = split_documents(cache, 0.05, chunk_length=256)
    per_token = cache.document_bytes.sum() / len(cache)
    for size in sorted(args.sizes):
        count = int(size * 1e6 / per_token)
        stream = TokenStream(Repeated(train, count), np.array([0]), np.array([count]))
        started = time.perf_counter()
        original = Original(cache, [args.text], stream, tokenizer)
        parts = parts_of(spread_out(val), original.spelling, spaced=original.spaced)
        held_out = [part.words for part in parts]
        ids = val.read(0, 20 * WRITTEN)
        written = [original.spelling.spell(row)[0].tobytes() for row in ids.reshape(20, -1)]
        search, _ = original.search([original.words(text) for text in written], held_out)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{size:g} MB, {count:,} tokens: {seconds:.2f} s, process {peak:.0f} MB at most; "
            f"{sum(len(words) for words in held_out):,} words of held-out text, longest copy "
            f"{search.longest}"
        )


if __name__ == "__main__":
    main()
