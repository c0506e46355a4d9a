"""What a text and some minutes give: bits per byte of held-out text, ours and nanoGPT's, in turn.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python benchmarks/quality.py story.txt other.txt --minutes 1 5 --nanogpt ../nanoGPT

Each text's last tenth is held out; every program trains on the same bytes and is measured on the
same. nanoGPT has its README's recipe for a CPU, letter by letter as there; how many iterations fit
the minutes is timed for it first, in seconds that do not count. Ours gets the text and the minutes
alone. With --all also nanoGPT's larger recipe, and ours with the text alone, in its own time.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = 0.1
PILOT = 40  # iterations by which nanoGPT's speed is found
COMMON = "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20".split()
RECIPES = {
    "nanoGPT, its CPU recipe": (
        "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0"
    ).split(),
    "nanoGPT, its larger one": [],
}
OURS, DEFAULTS = "ours, --minutes", "ours, the text alone"


def run(*words: object, cwd: Path = ROOT) -> str:
    """Run a script; returns what it printed, and ends this program where it failed."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


# ---------------------------------------------------------------------------- nanoGPT


def prepare_letters(text: str, cut: int, folder: Path) -> None:
    """What its data/shakespeare_char/prepare.py makes of a text."""
    letters = sorted(set(text))
    index = {letter: i for i, letter in enumerate(letters)}
    ids = np.array([index[letter] for letter in text], np.uint16)
    folder.mkdir(parents=True, exist_ok=True)
    ids[:cut].tofile(folder / "train.bin")
    ids[cut:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(letters), "stoi": index, "itos": dict(enumerate(letters))}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def train_nanogpt(recipe: list[str], checkout: Path, minutes: float) -> float:
    """Train for the minutes; returns the nats per letter of the held-out text."""

    def train(iterations: int, every: int) -> float:
        lengths = [f"--max_iters={iterations}", f"--lr_decay_iters={iterations}"]
        words = [*COMMON, *recipe, *lengths, f"--eval_interval={every}", "--dataset=text"]
        started = time.perf_counter()
        run("train.py", *words, "--out_dir=out", "--always_save_checkpoint=True", cwd=checkout)
        return time.perf_counter() - started

    few, more = train(PILOT, 10**6), train(3 * PILOT, 10**6)
    an_iteration = max(1e-4, (more - few) / (2 * PILOT))
    fixed = few - PILOT * an_iteration  # starting, and the evaluation at the first iteration
    every = max(1, int((60 * minutes - 2 * fixed) / an_iteration / 4))
    train(4 * every, every)
    return letters_loss(checkout)


def letters_loss(checkout: Path) -> float:
    """Mean loss of its last checkpoint over all held-out letters, in windows of its context."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    saved = torch.load(checkout / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
    model = module.GPT(module.GPTConfig(**saved["model_args"]))
    model.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in saved["model"].items()})
    model.eval()
    ids = torch.from_numpy(np.fromfile(checkout / "data/text/val.bin", np.uint16).astype(np.int64))
    size, total = saved["model_args"]["block_size"], 0.0
    with torch.inference_mode():
        for at in range(0, len(ids) - 1, size):
            window = ids[at : at + size + 1]
            logits, _ = model(window[None, :-1], window[None, 1:])
            total += F.cross_entropy(logits[0], window[1:], reduction="sum").item()
    return total / (len(ids) - 1)


# ---------------------------------------------------------------------------- ours


def train_ours(train: Path, val: Path, folder: Path, flags: list[object]) -> float:
    """Train with these flags alone; returns the bits per byte of the held-out text."""
    run("run_llama.py", "--option", "pretrain", "--pretrain_data", train, "--save_dir", folder,
        "--cache_dir", folder / "cache", "--overwrite", *flags)  # fmt: skip
    printed = run("check_model_precision.py", folder / "best-model.pt", "--text", val)
    return float(re.search(r"([\d.]+) bits per byte", printed)[1])


def main() -> None:
    """Take turns, and print a table a text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--minutes", nargs="+", type=float, default=[1.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337])
    parser.add_argument("--nanogpt", type=Path, help="a checkout; without one it is left out")
    parser.add_argument("--all", action="store_true", help="the rows that take longer, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for path in args.texts:
            compare(path, args, work)


def compare(path: Path, args: argparse.Namespace, work: Path) -> None:
    """The rows of one text."""
    text = path.read_text(encoding="utf-8")
    cut = round((1 - HELD_OUT) * len(text))
    train, val = work / f"{path.stem}-train.txt", work / f"{path.stem}-val.txt"
    train.write_text(text[:cut], encoding="utf-8", newline="")
    val.write_text(text[cut:], encoding="utf-8", newline="")
    letters_per_byte = len(text[cut:]) / len(text[cut:].encode())
    checkout = work / "nanoGPT"
    if args.nanogpt is not None:
        shutil.copytree(args.nanogpt, checkout, dirs_exist_ok=True)
        prepare_letters(text, cut, checkout / "data" / "text")
    print(f"\n{path.name}: {len(text[:cut].encode()):,} bytes to train on, bits per byte of "
          f"{len(text[cut:].encode()):,} others")  # fmt: skip
    for minutes in args.minutes:
        found: dict[str, list[float]] = {}
        for seed in args.seeds:
            timed, alone = ["--minutes", minutes, "--seed", seed], ["--seed", seed]
            found.setdefault(OURS, []).append(train_ours(train, val, work / "ours", timed))
            if args.all:
                found.setdefault(DEFAULTS, []).append(train_ours(train, val, work / "alone", alone))
            recipes = [*RECIPES.items()][: None if args.all else 1]
            for recipe, flags in recipes if args.nanogpt else ():
                loss = train_nanogpt(flags, checkout, minutes)
                found.setdefault(recipe, []).append(loss / math.log(2) * letters_per_byte)
        for who, values in found.items():
            ratio = statistics.median(
                ours / other for ours, other in zip(found[OURS], values, strict=True)
            )
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            print(
                f"{minutes:g} min  {who:<26} {statistics.median(values):.3f}{spread}, ours is "
                f"{ratio:.2f} of it",
                flush=True,
            )


if __name__ == "__main__":
    main()
