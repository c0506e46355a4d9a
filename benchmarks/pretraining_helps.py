"""Does pretraining help? SST-5 fine-tuned with all weights, from a pretrained model and from none.

    python data/download.py sst
    python benchmarks/pretraining_helps.py --text reviews.txt --minutes 30

One model is pretrained on the text, a document a line, which holds no sentence of SST. Another
goes on from it with SST's training sentences, without their labels. The untrained one has their
shape and vocabulary and random weights. Each is fine-tuned with every learning rate and pooling and
the first seed, and with what was best for it with all seeds. The accuracy on dev is that of the
best epoch, on test that of the same model.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from programs import ROOT, run

from llama import load_pretrained, model_payload
from minllama.formats.pt_file import save_pt

FINETUNE = "--batch_size 32 --epochs 3".split()
SENTENCES = "--sentences_only --document_per_line --epochs 3 --max_seq_len 128".split()


def pretrain(folder: Path, *words: object) -> Path:
    """The model of a pretraining run, made unless an earlier one left it."""
    model = folder / "final-model.pt"
    if not model.is_file():
        run("run_llama.py", "--option", "pretrain", "--document_per_line", "--save_dir", folder,
            "--cache_dir", folder.parent / "cache", "--overwrite", *words)  # fmt: skip
    return model


def untrained(like: Path, path: Path, seed: int) -> Path:
    """A model of the same shape and vocabulary with random weights."""
    torch.manual_seed(seed)
    model = load_pretrained(like)
    model.init_weights(model)
    save_pt(path, model_payload(model))
    return path


def finetune(model: Path, data: Path, folder: Path, *words: object) -> tuple[float, float]:
    """The accuracies on dev and test of a fine-tuning's best epoch."""
    splits = [w for s in ("train", "dev", "test") for w in (f"--{s}", data / f"sst-{s}.txt")]
    outs = ["--dev_out", folder / "dev.txt", "--test_out", folder / "test.txt"]
    printed = run("run_llama.py", "--option", "finetune", *splits, *outs, *FINETUNE,
                  "--pretrained_model_path", model, "--save_dir", folder, "--overwrite",
                  *words)  # fmt: skip
    dev, test = (float(re.search(rf"{s} accuracy ([\d.]+)", printed)[1]) for s in ("dev", "test"))
    return dev, test


def measure(
    name: str, models: Sequence[Path], data: Path, work: Path, args: argparse.Namespace
) -> str:
    """A row of the table: the best recipe of those asked for, with a model for each seed."""
    recipes = list(itertools.product(args.pooling, args.lr))

    def accuracies(number: int, pooling: str, lr: float) -> tuple[float, float]:
        words = ["--pooling", pooling, "--lr", lr, "--seed", args.seeds[number]]
        found = finetune(models[number], data, work / "finetuned", *words)
        print(f"{name}: {' '.join(map(str, words))}: dev {found[0]}, test {found[1]}", flush=True)
        return found

    first = {recipe: accuracies(0, *recipe) for recipe in recipes}
    best = max(first, key=first.__getitem__)
    rows = [first[best], *(accuracies(number, *best) for number in range(1, len(models)))]
    columns = zip(*rows, strict=True)
    cells = [f"{statistics.mean(v):.3f} ({', '.join(f'{x:.3f}' for x in v)})" for v in columns]
    return f"| {name} | {best[0]}, {best[1]:g} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--text", type=Path, required=True, help="to pretrain on, a document a line"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="of the pretraining")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder of sst-*.txt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--pooling", nargs="+", default=["last", "mean"])
    parser.add_argument("--work", type=Path, required=True, help="folder of the models, kept there")
    args = parser.parse_args()
    data, work = args.data.resolve(), args.work.resolve()
    text = args.text.resolve()
    pretrained = pretrain(work / "pretrained", "--pretrain_data", text, "--minutes", args.minutes)
    sentences = [data / "sst-train.txt", *SENTENCES, "--pretrained_model_path", pretrained]
    further = pretrain(work / "further", "--pretrain_data", *sentences)
    random = [untrained(pretrained, work / f"untrained-{seed}.pt", seed) for seed in args.seeds]
    every = len(args.seeds)
    starts = {
        "random weights": random,
        "pretrained": [pretrained] * every,
        "pretrained, then on SST's sentences": [further] * every,
    }
    rows = [measure(name, models, data, work, args) for name, models in starts.items()]
    print("\n| start | pooling, lr | dev | test |\n|---|---|---|---|\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
