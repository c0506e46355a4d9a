"""Recipes for texts that are read often: bits per byte of variants beside a base, in pairs.

    python benchmarks/recipes.py TEXT... --kilobytes 100 --passes 12 --seeds 1 2

Tokens are fixed, not time, so neither the machine's speed nor its load changes a figure. Of the
beginning of each text two twentieths are held out. A variant is compared with the base of the same
text and seed; printed is the mean of the ratios and its standard error. What is done is kept in
--results and not done again; several of these at once share them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import optimizer as optimizers
from config import LlamaConfig, recommended_decay, recommended_lr
from llama import Llama, NextTokenLoss
from minllama.machine.device import autocast, training_arithmetic
from minllama.text.reading import Reading
from minllama.text.stream import TokenStream
from minllama.training.fitting import batch_tokens
from tokenizer import Tokenizer, train_vocabulary
from utils import PretrainDataset, shuffled

CPU, DTYPE, PIECES, HELD_OUT = torch.device("cpu"), torch.bfloat16, 20, (4, 14)
BASE: dict[str, Any] = {
    "shape": (128, 4, 2),  # width, layers, heads
    "context": 256,
    "dropout": 0.2,
    "decay": None,  # the one that is recommended
    "moving": True,  # each epoch is cut elsewhere
    "vocab_size": None,  # what suits the text
    "rate": 1.0,  # times the one that is recommended
    "zero": False,  # the matrices that end a branch begin at zero
    "bpe_dropout": 0.0,  # of merges, from the second epoch on
    "normuon": False,  # each row of an update has the size of its mean square (arXiv:2510.05491)
    "cautious": False,  # weights decay where the update has their sign (arXiv:2510.12402)
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as before": {"shape": (64, 3, 2), "decay": 0.1, "moving": False},
    "decay 0.1": {"decay": 0.1},
    "decay 0.4": {"decay": 0.4},
    "decay 0.8": {"decay": 0.8},
    "decay 1.6": {"decay": 1.6},
    "decay 3.2": {"decay": 3.2},
    "cautious decay 1.6": {"decay": 1.6, "cautious": True},
    "fixed cuts": {"moving": False},
    "dropout 0.1": {"dropout": 0.1},
    "dropout 0.3": {"dropout": 0.3},
    "3 x 64": {"shape": (64, 3, 2)},
    "4 x 96": {"shape": (96, 4, 3)},
    "4 x 192": {"shape": (192, 4, 3)},
    "context 128": {"context": 128},
    "context 512": {"context": 512},
    "512 pieces": {"vocab_size": 512},
    "2,048 pieces": {"vocab_size": 2048},
    "branches from zero": {"zero": True},
    "BPE dropout 0.1": {"bpe_dropout": 0.1},
    "NorMuon": {"normuon": True},
    "half the rate": {"rate": 0.5},
    "twice the rate": {"rate": 2.0},
}


# ---------------------------------------------------------------------------- the text


def pieces_of(path: Path, kilobytes: int) -> tuple[list[str], list[str]]:
    """(to train on, held out): stretches of whole lines of the text's beginning."""
    text = path.read_bytes()[: round(kilobytes * 1000 / (1 - len(HELD_OUT) / PIECES))]
    lines = text.decode("utf-8", "ignore").splitlines(keepends=True)
    whole, before, pieces = sum(map(len, lines)), 0, [""] * PIECES
    for line in lines:
        pieces[before * PIECES // whole] += line
        before += len(line)
    train = [piece for at, piece in enumerate(pieces) if piece and at not in HELD_OUT]
    return train, [pieces[at] for at in HELD_OUT]


def stream_of(documents: Sequence[Sequence[int]]) -> TokenStream:
    """Documents, one after the other."""
    ids = np.concatenate([np.array(document) for document in documents])
    return TokenStream(ids, np.array([0]), np.array([len(ids)]))


def encoded(tokenizer: Tokenizer, piece: str, dropout: float) -> list[int]:
    """A piece of text as a document, merges left out at random where there is dropout."""
    if not dropout:
        return tokenizer.encode(piece, bos=True, eos=True)
    ids = tokenizer.sp_model.encode(piece, enable_sampling=True, alpha=dropout)
    return [tokenizer.bos_id, *ids, tokenizer.eos_id]


# ---------------------------------------------------------------------------- the optimizer


class VariantMuon(optimizers.Muon):
    """Muon with what was tried and not taken; row sizes of NorMuon are kept beside the moments."""

    recipe: dict[str, Any]

    @torch.no_grad()
    def step(self) -> None:
        """One matrix after the other."""
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                    state["rows"], state["step"] = torch.zeros(len(weight), 1), 0
                moment = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                nesterov = weight.grad.lerp(moment, group["momentum"])
                update = optimizers.orthogonalize(nesterov[None], self.dtype)[0]
                if self.recipe["normuon"]:
                    state["step"] += 1
                    rows = state["rows"].lerp_(update.square().mean(1, keepdim=True), 0.05)
                    scaled = update / (rows / (1 - 0.95 ** state["step"])).sqrt().clamp(min=1e-10)
                    update = scaled * (update.norm() / scaled.norm())
                kept = 1.0 - group["lr"] * group["weight_decay"]
                if self.recipe["cautious"]:
                    kept = torch.where(update * weight > 0, kept, 1.0)
                weight.mul_(kept)
                weight.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(weight.shape)))


# ---------------------------------------------------------------------------- a run


def train(path: Path, recipe: dict[str, Any], args: argparse.Namespace, seed: int) -> float:
    """Train one model; returns bits per byte of the held-out pieces after the last step."""
    torch.manual_seed(seed)
    train_pieces, val_pieces = pieces_of(path, args.kilobytes)
    vocabulary = args.work / f"{path.stem}-{args.kilobytes}-{recipe['vocab_size']}.model"
    if not vocabulary.exists():
        text = vocabulary.with_suffix(".txt")
        text.write_text("".join(train_pieces), encoding="utf-8", newline="")
        train_vocabulary([text], vocabulary, reading=Reading(), vocab_size=recipe["vocab_size"])
    tokenizer, context = Tokenizer(tokenizer_model=vocabulary), recipe["context"]

    def documents(dropout: float = 0.0) -> TokenStream:
        return stream_of([encoded(tokenizer, piece, dropout) for piece in train_pieces])

    stream = documents()
    held_out = stream_of([encoded(tokenizer, piece, 0.0) for piece in val_pieces])
    chunks = PretrainDataset(stream, context, tokenizer=tokenizer, seed=seed)
    tokens = round(args.passes * len(stream))
    rows = batch_tokens(tokens, context) // context
    steps = tokens // (rows * context)
    dim, n_layers, n_heads = recipe["shape"]
    config = LlamaConfig(
        vocab_size=tokenizer.n_words, dim=dim, n_layers=n_layers, n_heads=n_heads,
        max_seq_len=context, dropout=recipe["dropout"],
    )  # fmt: skip
    model = NextTokenLoss(Llama(config))
    if recipe["zero"]:
        for layer in model.model.layers:
            nn.init.zeros_(layer.attention.compute_output.weight)
            nn.init.zeros_(layer.feed_forward.w2.weight)
    lr, decay = recipe["rate"] * recommended_lr(config, "muon"), recipe["decay"]
    if decay is None:
        sizes = {"tokens": tokens, "distinct": len(stream), "batch": rows * context}
        decay = recommended_decay(config, lr, **sizes)
    optimizer = optimizers.make_optimizer(
        model, name="muon", lr=lr, weight_decay=decay, dtype=DTYPE
    )
    if recipe["normuon"] or recipe["cautious"]:
        optimizer.parts["muon"].__class__ = VariantMuon
        optimizer.parts["muon"].recipe = recipe
    numbers = order(len(chunks), seed)
    with training_arithmetic(CPU, DTYPE, deterministic=False):
        for step in range(steps):
            batch = [next(numbers) for _ in range(rows)]
            if recipe["bpe_dropout"] and batch[0] // len(chunks) != batch[-1] // len(chunks):
                chunks = PretrainDataset(
                    documents(recipe["bpe_dropout"]), context, tokenizer=tokenizer, seed=seed
                )
                numbers = order(len(chunks), seed + step, first=1)
            if not recipe["moving"]:
                batch = [number % len(chunks) for number in batch]
            schedule = {"peak_lr": lr, "min_lr": 0.0, "scheduler": "linear"}
            optimizers.set_learning_rate(
                optimizer,
                optimizers.learning_rate(
                    step, total_steps=steps, warmup_steps=round(0.05 * steps), **schedule
                ),
            )
            with autocast(CPU, DTYPE):
                loss, count = model(*chunks.batch(batch))
            (loss / count).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return bits_per_byte(model.eval(), PretrainDataset(held_out, context, tokenizer=tokenizer))


def order(count: int, seed: int, *, first: int = 0):
    """Numbers of chunks, epoch after epoch, as `PretrainDataset` numbers them."""
    epoch = first
    while True:
        yield from (epoch * count + shuffled(np.arange(count), count, seed, epoch)).tolist()
        epoch += 1


@torch.inference_mode()
def bits_per_byte(model: NextTokenLoss, held_out: PretrainDataset) -> float:
    """Of all of the held-out text, in chunks of the model's context."""
    nats = 0.0
    with autocast(CPU, DTYPE):
        for start in range(0, len(held_out), 16):
            numbers = range(start, min(start + 16, len(held_out)))
            nats += float(model(*held_out.batch(numbers))[0])
    return nats / math.log(2) / held_out.utf8_bytes


# ---------------------------------------------------------------------------- all of them


def main() -> None:
    """Train what is missing, and print each variant's ratio to the base."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--kilobytes", type=int, default=100, help="of each text to train on")
    parser.add_argument("--passes", type=float, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--work", type=Path, default=Path("recipes"), help="folder of vocabularies")
    parser.add_argument("--results", type=Path, default=Path("recipes.jsonl"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # several at once are faster than one with several threads
    ratios: dict[str, list[float]] = {name: [] for name in args.variants}
    for path in args.texts:
        for seed in args.seeds:
            base = result_of(path, {}, args, seed)
            for name in args.variants:
                found = result_of(path, VARIANTS[name], args, seed)
                ratios[name].append(found / base)
                print(f"{path.name:>20} {seed:>3} {name:<20} {found:.4f} {found / base:.4f}")
    for name, found in ratios.items():
        error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
        print(f"{name:<20} {statistics.mean(found):.4f} +- {error:.4f}", flush=True)


def result_of(path: Path, changes: dict[str, Any], args: argparse.Namespace, seed: int) -> float:
    """That of a run, made now or earlier."""
    recipe = BASE | changes
    key = json.dumps([path.name, args.kilobytes, args.passes, seed, recipe])
    if args.results.exists():
        for line in args.results.read_text(encoding="utf-8").splitlines():
            if (found := json.loads(line))["key"] == key:
                return found["bits_per_byte"]
    bits = train(path, recipe, args, seed)
    with args.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"key": key, "bits_per_byte": bits}) + "\n")
    return bits


if __name__ == "__main__":
    main()
