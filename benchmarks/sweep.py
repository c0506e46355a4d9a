"""The runs that the rule of --minutes was made of: bits per byte by shape, tokens and repetition.

    python benchmarks/sweep.py reviews.txt --vocab_size 3072

Each run trains one shape on a share of the text, a given number of times, in steps of 1,024 tokens
with a linear schedule; a last tenth of the text is held out. What is done is kept in --results and
not done again. The figures do not depend on the machine's speed or load.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from programs import run

from minllama.runs.metrics import read_records

SHAPES = ((64, 3, 2), (96, 4, 3), (128, 4, 2), (192, 4, 3), (256, 4, 4))  # width, layers, heads
SHARES = (0.05, 0.1, 0.2, 0.4, 1.0)
REPEATED = ((0.05, 4), (0.05, 12))  # share, epochs
COMMON = (
    "--option pretrain --max_seq_len 256 --pretrain_batch_size 4 --lr_scheduler linear "
    "--checkpoint_interval 0 --compile off --dtype float32 --overwrite"
).split()


def train(work: Path, vocabulary: Path, share: float, epochs: int, shape: tuple) -> dict:
    """One run; returns its tokens and the last and best bits per byte."""
    dim, layers, heads = shape
    run("run_llama.py", *COMMON, "--pretrain_data", work / f"train-{share:g}.txt", "--val_data",
        work / "val.txt", "--tokenizer_model", vocabulary, "--dim", dim, "--n_layers", layers,
        "--n_heads", heads, "--epochs", epochs, "--save_dir", work / "run",
        "--cache_dir", work / "cache")  # fmt: skip
    records = list(read_records(work / "run" / "metrics.jsonl"))
    bits = [r["bits_per_byte"] for r in records if r.get("bits_per_byte") is not None]
    return {"tokens": records[-1]["tokens"], "last": bits[-1], "best": min(bits)}


def main() -> None:
    """Train what is missing of the grid, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--vocab_size", type=int, default=3072)
    parser.add_argument("--results", type=Path, default=Path("sweep.jsonl"))
    args = parser.parse_args()
    done = {}
    if args.results.exists():
        lines = args.results.read_text(encoding="utf-8").splitlines()
        done = {tuple(found["key"]): found for found in map(json.loads, lines)}
    text = args.text.read_text(encoding="utf-8")
    cut = round(0.9 * len(text))
    print(f"{'shape':>12} {'epochs':>6} {'tokens':>10} {'last':>7} {'best':>7}")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "val.txt").write_text(text[cut:], encoding="utf-8", newline="")
        for share in SHARES:
            path = work / f"train-{share:g}.txt"
            path.write_text(text[: round(share * cut)], encoding="utf-8", newline="")
        vocabulary = work / "vocabulary.model"
        run("tokenizer.py", "train", "--input", work / "train-1.txt", "--vocab_size",
            args.vocab_size, "--output", vocabulary)  # fmt: skip
        for share, epochs in (*((share, 1) for share in SHARES), *REPEATED):
            for shape in SHAPES:
                key = (args.text.name, args.vocab_size, share, epochs, *shape)
                if key not in done:
                    found = {"key": key, **train(work, vocabulary, share, epochs, shape)}
                    with args.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(found) + "\n")
                    done[key] = found
                found = done[key]
                print(
                    f"{'x'.join(map(str, shape[:2])):>12} {epochs:>6} {found['tokens']:>10,} "
                    f"{found['last']:>7.4f} {found['best']:>7.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
