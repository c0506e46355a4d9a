r"""What a text and some minutes give: bits per byte of held-out text, ours and others', in turn.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    git clone https://github.com/karpathy/llama2.c ../llama2.c
    pip install requests
    python benchmarks/quality.py one.txt two.txt --minutes 1 5 --nanogpt ../nanoGPT \
        --llama2c ../llama2.c

Each text's last tenth is held out; every program trains on the same bytes and is measured on the
same. nanoGPT has its README's recipe for a CPU, letter by letter as there; llama2.c its defaults
with a vocabulary of the text's own, in batches that a CPU can do. Ours gets the text and the
minutes alone. With --all also nanoGPT's larger recipe, and ours with the text alone, in its own
time; with --flags "--dropout 0" ours with these, too, and with --before an earlier version of ours.
"""

from __future__ import annotations

import argparse
import functools
import re
import shlex
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from peers import NANOGPT_CPU, train_llama2c, train_nanogpt
from programs import ROOT, run

HELD_OUT = 0.1
OURS = "ours, --minutes"


def train_ours(train: Path, val: Path, folder: Path, *flags: object, root: Path = ROOT) -> float:
    """Train with these flags alone; returns the bits per byte of the held-out text."""
    run("run_llama.py", "--option", "pretrain", "--pretrain_data", train, "--save_dir", folder,
        "--cache_dir", folder / "cache", "--overwrite", *flags, cwd=root)  # fmt: skip
    printed = run("check_model_precision.py", folder / "best-model.pt", "--text", val, cwd=root)
    return float(re.search(r"([\d.]+) bits per byte", printed)[1])


def main() -> None:
    """Take turns, and print a table a text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--minutes", nargs="+", type=float, default=[1.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337], help="of ours")
    parser.add_argument("--nanogpt", type=Path, help="a checkout; without one it is left out")
    parser.add_argument("--llama2c", type=Path, help="the same")
    parser.add_argument("--before", type=Path, help="an earlier version of ours: a checkout")
    parser.add_argument("--flags", nargs="+", default=[], help="of ours, beside --minutes")
    parser.add_argument("--all", action="store_true", help="the rows that take longer, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for path in args.texts:
            compare(path, args, Path(name))


def programs(
    args: argparse.Namespace, train: Path, val: Path, work: Path
) -> dict[str, Callable[[int, float], float]]:
    """By name, what trains one of them with a seed for some minutes, to bits per byte."""
    both = [path.read_text(encoding="utf-8") for path in (train, val)]

    def ours(*flags: str, root: Path = ROOT) -> Callable[[int, float], float]:
        return lambda seed, minutes: train_ours(
            train, val, work / "ours", "--seed", seed, "--minutes", minutes, *flags, root=root
        )

    found = {OURS: ours()} | {f"ours, {flags}": ours(*shlex.split(flags)) for flags in args.flags}
    if args.before is not None:
        found["ours, before"] = ours(root=args.before.resolve())
    if args.all:
        found["ours, the text alone"] = lambda seed, minutes: train_ours(
            train, val, work / "alone", "--seed", seed
        )
    if args.nanogpt is not None:
        shutil.copytree(args.nanogpt, work / "nanogpt", dirs_exist_ok=True)
        recipes = {"nanoGPT, its CPU recipe": NANOGPT_CPU, "nanoGPT, its larger one": []}
        for name, recipe in [*recipes.items()][: None if args.all else 1]:
            peer = functools.partial(train_nanogpt, work / "nanogpt", *both, recipe=recipe)
            found[name] = lambda seed, minutes, peer=peer: peer(minutes)
    if args.llama2c is not None:
        shutil.copytree(args.llama2c, work / "llama2c", dirs_exist_ok=True)
        peer = functools.partial(train_llama2c, work / "llama2c", *both)
        found["llama2.c's train.py"] = lambda seed, minutes, peer=peer: peer(minutes)
    return found


def compare(path: Path, args: argparse.Namespace, work: Path) -> None:
    """The rows of one text."""
    text = path.read_text(encoding="utf-8")
    cut = round((1 - HELD_OUT) * len(text))
    train, val = work / f"{path.stem}-train.txt", work / f"{path.stem}-val.txt"
    train.write_text(text[:cut], encoding="utf-8", newline="")
    val.write_text(text[cut:], encoding="utf-8", newline="")
    print(f"\n{path.name}: {train.stat().st_size:,} bytes to train on, bits per byte of "
          f"{val.stat().st_size:,} others")  # fmt: skip
    trained = programs(args, train, val, work)
    for minutes in args.minutes:
        found: dict[str, list[float]] = {name: [] for name in trained}
        for seed in args.seeds:
            for name, train_one in trained.items():
                found[name].append(train_one(seed, minutes))
        for name, values in found.items():
            ratio = statistics.median(
                ours / other for ours, other in zip(found[OURS], values, strict=True)
            )
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            print(
                f"{minutes:g} min  {name:<26} {statistics.median(values):.3f}{spread}, ours is "
                f"{ratio:.2f} of it",
                flush=True,
            )


if __name__ == "__main__":
    main()
