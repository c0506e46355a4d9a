"""What --min_p does to what a model writes: broken characters, unknown words, variety.

    python benchmarks/sampling.py MODEL TEXT... [--temperature 0.8] [--min_p 0 0.01 0.02]

TEXT is what the model was trained on. Units are words, or the characters of Chinese.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from llama import load_pretrained  # noqa: E402
from minllama.model.generation import Sampling, generate_tokens  # noqa: E402
from minllama.text.documents import read_documents  # noqa: E402
from minllama.text.reading import Reading  # noqa: E402
from tokenizer import tokenizer_of  # noqa: E402

TEXTS, TOKENS = 64, 120  # at most so many tokens each


def units(text: str) -> list[str]:
    """The words of a text, or its Chinese characters."""
    return re.findall(r"[\u4e00-\u9fff]|[a-z']+", text.lower())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--min_p", type=float, nargs="+", default=[0, 0.01, 0.02, 0.05, 0.1])
    args = parser.parse_args()
    blocks = (block for path in args.texts for block in read_documents(path, Reading()))
    known = units(" ".join(block.text for block in blocks))
    words, pairs = {*known}, {*itertools.pairwise(known)}
    model = load_pretrained(args.model)
    tokenizer = tokenizer_of(model)
    print("| min_p | texts with broken characters | unknown | unseen pairs | distinct pairs |")
    print("|---:|---:|---:|---:|---:|")
    for min_p in args.min_p:
        rows: list[list[int]] = [[] for _ in range(TEXTS)]
        for step in generate_tokens(
            model,
            [tokenizer.encode("", True, False)] * TEXTS,
            max_new_tokens=TOKENS,
            sampling=Sampling(args.temperature, min_p=min_p),
            seeds=range(TEXTS),
            stop_ids=tokenizer.vocabulary.end_ids,
        ):
            for row, token in zip(rows, step, strict=True):
                row += [] if token is None else [token]
        texts = [tokenizer.decode(row) for row in rows]
        written = [units(text) for text in texts]
        wrote = [*itertools.chain.from_iterable(written)]
        wrote_pairs = [pair for text in written for pair in itertools.pairwise(text)]
        broken = sum("\ufffd" in text for text in texts)
        unknown = sum(word not in words for word in wrote) / len(wrote)
        unseen = sum(pair not in pairs for pair in wrote_pairs) / len(wrote_pairs)
        distinct = len({*wrote_pairs}) / len(wrote_pairs)
        print(f"| {min_p:g} | {broken} | {unknown:.2%} | {unseen:.1%} | {distinct:.1%} |")


if __name__ == "__main__":
    main()
