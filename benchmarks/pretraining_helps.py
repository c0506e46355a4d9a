"""Does pretraining help? Fine-tune SST-5 from a pretrained and from an untrained model, in pairs.

    python data/download.py sst
    python benchmarks/pretraining_helps.py --data data --seeds 1 2 3

For each seed a vocabulary-sharing pair of models of one shape: one pretrained on the sentences of
sst-train.txt, one stopped after a single step with a learning rate of next to nothing. Both are
fine-tuned alike; the table has the dev accuracy of the best epoch, and the majority class's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPE = "--dim 128 --n_layers 4 --n_heads 2 --max_seq_len 128 --dropout 0.1".split()
PRETRAIN = "--epochs 8 --pretrain_batch_size 16 --pretrain_lr 3e-3 --sentences_only".split()
UNTRAINED = "--max_steps 1 --pretrain_lr 1e-9 --sentences_only".split()
FINETUNE = "--epochs 4 --batch_size 16 --lr 3e-4 --hidden_dropout_prob 0.3".split()


def run(*words: str | Path) -> None:
    """Run one of the program's scripts; a failure ends this one with what it said."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout}\n{done.stderr}")


def dev_accuracy(folder: Path) -> float:
    """The best dev accuracy on record in a fine-tuning run's folder."""
    lines = (folder / "finetune-sst-metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return max(json.loads(line).get("dev_accuracy") or 0.0 for line in lines)


def one_seed(seed: int, data: Path, vocabulary: Path, work: Path) -> dict[str, float]:
    """Dev accuracy of the fine-tuned model, by where it started from."""
    accuracies = {}
    common = ["--seed", str(seed), "--cache_dir", work / "cache", "--overwrite"]
    for start, flags in (("untrained", UNTRAINED), ("pretrained", PRETRAIN)):
        folder = work / f"{start}-{seed}"
        text = ["--pretrain_data", data / "sst-train.txt", "--tokenizer_model", vocabulary]
        run("run_llama.py", "--option", "pretrain", *text, *SHAPE, *flags, *common,
            "--save_dir", folder)  # fmt: skip
        splits = [w for s in ("train", "dev", "test") for w in (f"--{s}", data / f"sst-{s}.txt")]
        outs = ["--dev_out", folder / "dev.txt", "--test_out", folder / "test.txt"]
        run("run_llama.py", "--option", "finetune", *splits, *outs, *FINETUNE, *common,
            "--pretrained_model_path", folder / "final-model.pt", "--save_dir", folder)  # fmt: skip
        accuracies[start] = dev_accuracy(folder)
    return accuracies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder of sst-*.txt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--vocab_size", type=int, default=4096)
    arguments = parser.parse_args()
    data = arguments.data.resolve()
    labels = [
        line.split(" ||| ")[0]
        for line in (data / "sst-dev.txt").read_text(encoding="utf-8").splitlines()
    ]
    print(f"majority class on dev: {max(Counter(labels).values()) / len(labels):.3f}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "sst.model"
        run("tokenizer.py", "train", "--input", data / "sst-train.txt", "--sentences_only",
            "--vocab_size", str(arguments.vocab_size), "--output", vocabulary)  # fmt: skip
        print("| seed | untrained | pretrained | seconds |\n|---|---|---|---|")
        for seed in arguments.seeds:
            started = time.perf_counter()
            rows.append(one_seed(seed, data, vocabulary, Path(folder)))
            seconds = time.perf_counter() - started
            print(
                f"| {seed} | {rows[-1]['untrained']:.3f} | {rows[-1]['pretrained']:.3f} "
                f"| {seconds:.0f} |",
                flush=True,
            )
    means = [statistics.mean(row[start] for row in rows) for start in ("untrained", "pretrained")]
    print(f"| mean | {means[0]:.3f} | {means[1]:.3f} | |")


if __name__ == "__main__":
    main()
