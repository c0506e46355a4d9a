"""Does pretraining help? Fine-tune SST-5 from a pretrained and from an untrained model, in pairs.

    python data/download.py sst cfimdb
    python benchmarks/pretraining_helps.py --data data --seeds 1 2 3

One model is pretrained on the training sentences of SST-5 and CFIMDB; for each seed another of the
same shape and vocabulary is stopped after a single step with a learning rate of next to nothing.
Both are fine-tuned alike, by adapters: with all weights trained, SST-5 alone teaches a model of a
million parameters as much as its pretraining did. The table has the dev accuracy of the best epoch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPE = "--dim 128 --n_layers 4 --n_heads 2 --max_seq_len 128 --dropout 0.1".split()
PRETRAIN = "--epochs 5 --pretrain_lr 3e-3".split()
UNTRAINED = "--max_steps 1 --pretrain_lr 1e-9".split()
FINETUNE = "--lora_rank 8 --epochs 4 --batch_size 32 --lr 3e-3".split()
TEXTS = ("sst-train.txt", "cfimdb-train.txt")


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


def pretrain(folder: Path, data: Path, vocabulary: Path, flags: list[str], seed: int) -> Path:
    """The model of a pretraining run, made unless an earlier one left it."""
    model = folder / "final-model.pt"
    if not model.is_file():
        texts = [data / name for name in TEXTS]
        run("run_llama.py", "--option", "pretrain", "--pretrain_data", *texts, "--sentences_only",
            "--tokenizer_model", vocabulary, "--pretrain_batch_size", "16", *SHAPE, *flags,
            "--seed", str(seed), "--cache_dir", folder.parent / "cache", "--save_dir", folder,
            "--overwrite")  # fmt: skip
    return model


def finetune(model: Path, folder: Path, data: Path, seed: int) -> float:
    """Dev accuracy of the best epoch on SST-5."""
    splits = [w for s in ("train", "dev", "test") for w in (f"--{s}", data / f"sst-{s}.txt")]
    outs = ["--dev_out", folder / "dev.txt", "--test_out", folder / "test.txt"]
    run("run_llama.py", "--option", "finetune", *splits, *outs, *FINETUNE, "--seed", str(seed),
        "--pretrained_model_path", model, "--save_dir", folder, "--overwrite")  # fmt: skip
    return dev_accuracy(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder of sst-*.txt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--work", type=Path, help="folder to keep the models in, and to reuse")
    arguments = parser.parse_args()
    data = arguments.data.resolve()
    labels = [
        line.split(" ||| ")[0]
        for line in (data / "sst-dev.txt").read_text(encoding="utf-8").splitlines()
    ]
    print(f"majority class on dev: {max(Counter(labels).values()) / len(labels):.3f}")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        vocabulary = work / "sst.model"
        if not vocabulary.is_file():
            run("tokenizer.py", "train", "--input", *(data / name for name in TEXTS),
                "--sentences_only", "--vocab_size", "4096", "--output", vocabulary)  # fmt: skip
        pretrained = pretrain(work / "pretrained", data, vocabulary, PRETRAIN, arguments.seeds[0])
        print("| seed | untrained | pretrained |\n|---|---|---|")
        for seed in arguments.seeds:
            bare = pretrain(work / f"untrained-{seed}", data, vocabulary, UNTRAINED, seed)
            models = {"untrained": bare, "pretrained": pretrained}
            row = {
                name: finetune(model, work / f"{name}-finetuned-{seed}", data, seed)
                for name, model in models.items()
            }
            rows.append(row)
            print(f"| {seed} | {row['untrained']:.3f} | {row['pretrained']:.3f} |", flush=True)
    means = [statistics.mean(row[start] for row in rows) for start in ("untrained", "pretrained")]
    print(f"| mean | {means[0]:.3f} | {means[1]:.3f} |")


if __name__ == "__main__":
    main()
