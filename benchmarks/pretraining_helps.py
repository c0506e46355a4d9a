"""Does pretraining help? SST-5 fine-tuned with all weights, from a pretrained model and from none.

    python data/download.py sst
    python benchmarks/pretraining_helps.py --text reviews.txt --minutes 30

One model is pretrained on the text, a document a line, which holds no sentence of SST. Another
goes on from it with SST's training sentences, without their labels. The untrained one has their
shape and vocabulary and random weights. Each is fine-tuned with every learning rate and pooling and
the first seed, and with what was best for it with all seeds. The accuracy on dev is that of the
best epoch, on test that of the same model.

    python benchmarks/pretraining_helps.py --text reviews.txt --minutes 10 --megabytes 0.5 1 2 4 8

asks what the size of the text does: a model is pretrained on each beginning of it, all of one shape
and with the whole text's vocabulary.
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

SHAPE = "--dim 128 --n_layers 4 --n_heads 2".split()
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
    # Each epoch's dev accuracy is printed before that of the best one.
    dev, test = (re.findall(rf"{s} accuracy ([\d.]+)", printed)[-1] for s in ("dev", "test"))
    return float(dev), float(test)


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


Starts = dict[str, list[Path]]  # by name, a model for each seed


def starts_of_text(text: Path, data: Path, work: Path, args: argparse.Namespace) -> Starts:
    """From none, from the text, and from the text and then the sentences."""
    pretrained = pretrain(work / "pretrained", "--pretrain_data", text, "--minutes", args.minutes)
    sentences = [data / "sst-train.txt", *SENTENCES, "--pretrained_model_path", pretrained]
    further = pretrain(work / "further", "--pretrain_data", *sentences)
    return {
        "random weights": [
            untrained(pretrained, work / f"untrained-{seed}.pt", seed) for seed in args.seeds
        ],
        "pretrained": [pretrained] * len(args.seeds),
        "pretrained, then on SST's sentences": [further] * len(args.seeds),
    }


def starts_by_size(text: Path, data: Path, work: Path, args: argparse.Namespace) -> Starts:
    """From none, and from each beginning of the text."""
    vocabulary, found = work / "text.model", {}
    if not vocabulary.is_file():
        run("tokenizer.py", "train", "--input", text, "--output", vocabulary)
    for megabytes in args.megabytes:
        part = work / f"{megabytes:g}-MB.txt"
        lines = text.read_bytes()[: round(1e6 * megabytes)].rsplit(b"\n", 1)[0]
        part.write_bytes(lines + b"\n")
        words = ["--pretrain_data", part, "--minutes", args.minutes, *SHAPE]
        model = pretrain(work / f"{megabytes:g}", *words, "--tokenizer_model", vocabulary)
        found[f"{megabytes:g} MB"] = [model] * len(args.seeds)
    random = [untrained(model, work / f"untrained-{seed}.pt", seed) for seed in args.seeds]
    return {"random weights": random} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--text", type=Path, required=True, help="to pretrain on, a document a line"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="of the pretraining")
    parser.add_argument("--megabytes", type=float, nargs="+", help="of the text's beginning")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder of sst-*.txt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--pooling", nargs="+", default=["last", "mean"])
    parser.add_argument("--work", type=Path, required=True, help="folder of the models, kept there")
    args = parser.parse_args()
    data, work = args.data.resolve(), args.work.resolve()
    text = args.text.resolve()
    starts = starts_by_size if args.megabytes else starts_of_text
    found = starts(text, data, work, args)
    rows = [measure(name, models, data, work, args) for name, models in found.items()]
    print("\n| start | pooling, lr | dev | test |\n|---|---|---|---|\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
