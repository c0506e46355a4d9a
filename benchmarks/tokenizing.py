"""Text file to token cache beside SentencePiece's own batched encoding, in turn; prints ratios.

    python data/download.py tokenizer
    python benchmarks/tokenizing.py --tokenizer_model tokenizer.model
    python benchmarks/tokenizing.py --text my_text.txt --threads 2

Both read a file of a document a line and get the same number of threads. SentencePiece is timed
twice: at its best, into arrays and without writing them, and as it comes, into lists of integers.
Ours also checks the text, hashes it, marks documents, and leaves a verified file.

Without --text the text is made: words of the embedded stories and reviews (and of --words) at
random, and two words in a hundred invented, about as often as a book of some million words brings
one that it had not yet. No line comes twice, so nothing but words can be remembered.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minllama.text.documents import read_documents  # noqa: E402
from minllama.text.reading import Reading  # noqa: E402
from minllama.text.token_cache import TokenCache, build_or_load  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

INVENTED = 0.02  # share of the words
LINE_WORDS = 200


def made_lines(sources: list[Path], size: int) -> Iterator[str]:
    """Lines of random words of `sources`, some invented, of `size` characters in all."""
    texts = (block.text for path in sources for block in read_documents(path, Reading()))
    words = " ".join(texts).split()
    chance = random.Random(0)
    while size > 0:
        line = chance.choices(words, k=LINE_WORDS)
        for place in range(LINE_WORDS):
            if chance.random() < INVENTED:
                first, second = chance.choices(words, k=2)
                line[place] = first[: len(first) // 2] + second[len(second) // 2 :]
        text = " ".join(line) + "\n"
        size -= len(text)
        yield text


def ours(path: Path, tokenizer: Tokenizer, threads: int) -> int:
    """Tokens of the file, in a token cache made for it."""
    with tempfile.TemporaryDirectory() as folder:
        reading = Reading(document_per_line=True)
        cache = build_or_load([path], tokenizer, reading, Path(folder), threads=threads)
        count = len(cache) - 2 * len(cache.document_starts)  # BOS and EOS are not text
        close(cache)
    return count


def close(cache: TokenCache) -> None:
    """Let go of the mapped file: Windows removes no file that is open."""
    cache.tokens = cache.document_starts = cache.document_bytes = None
    cache.file_tokens = cache.file_documents = None


def in_arrays(path: Path, tokenizer: Tokenizer, threads: int) -> int:
    """Tokens of the file by SentencePiece, an array a document."""
    texts = path.read_text(encoding="utf-8").split("\n")
    encoded = tokenizer.sp_model.encode(texts, num_threads=threads, return_type="numpy")
    return sum(map(len, encoded))


def in_lists(path: Path, tokenizer: Tokenizer, threads: int) -> int:
    """Tokens of the file by SentencePiece, a list of integers a document."""
    texts = path.read_text(encoding="utf-8").split("\n")
    return sum(map(len, tokenizer.sp_model.encode(texts, num_threads=threads)))


PEERS: dict[str, Callable[[Path, Tokenizer, int], int]] = {
    "SentencePiece, into arrays": in_arrays,
    "SentencePiece, into lists": in_lists,
}


def compare(path: Path, tokenizer: Tokenizer, threads: int, rounds: int) -> None:
    """Print a row per peer: median speeds and the median of the ratios within a round."""
    size = path.stat().st_size
    speeds: dict[str, list[float]] = {}
    for _ in range(rounds):
        counts = set()
        for name, encode in {"ours": ours, **PEERS}.items():
            start = time.perf_counter()
            counts.add(encode(path, tokenizer, threads))
            speeds.setdefault(name, []).append(size / (time.perf_counter() - start))
        if len(counts) > 1:
            sys.exit(f"the programs differ in their tokens: {counts}")
    for name in PEERS:
        ratio = statistics.median(a / b for a, b in zip(speeds["ours"], speeds[name], strict=True))
        mine, theirs = (statistics.median(speeds[each]) / 1e6 for each in ("ours", name))
        print(f"| {threads} | {name} | {mine:.1f} | {theirs:.1f} | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, help="measure on this file instead of a made one")
    parser.add_argument("--words", type=Path, nargs="*", default=[], help="files to take words of")
    parser.add_argument("--megabytes", type=int, default=24, help="size of the made text")
    parser.add_argument("--tokenizer_model", type=Path, help="default: the embedded vocabulary")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    tokenizer = Tokenizer(tokenizer_model=arguments.tokenizer_model)
    data = ROOT / "data"
    sources = [data / "stories-train.jsonl", data / "reviews-train.txt", *arguments.words]
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.text or Path(folder) / "made.txt"
        if arguments.text is None:
            with path.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(made_lines(sources, arguments.megabytes * 10**6))
        print("| threads | peer | ours, MB/s | peer, MB/s | ratio |\n|---:|---|---:|---:|---:|")
        for threads in arguments.threads:
            compare(path, tokenizer, threads, arguments.rounds)


if __name__ == "__main__":
    main()
