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
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import optimizer as optimizers
from config import LlamaConfig, recommended_decay, recommended_lr
from llama import Llama, NextTokenLoss
from minllama.machine.device import autocast, training_arithmetic
from minllama.text.reading import Reading
from minllama.text.stream import TokenStream
from minllama.training.fitting import batch_tokens
from tokenizer import Tokenizer, train_vocabulary
from utils import PretrainDataset, batch_indices

CPU, DTYPE, PIECES, HELD_OUT = torch.device("cpu"), torch.bfloat16, 20, (4, 14)
BASE: dict[str, Any] = {
    "shape": (128, 4, 2),  # width, layers, heads
    "context": 256,
    "config": {},  # of LlamaConfig, beside these
    "dropout": 0.1,
    "embedding_dropout": None,  # of the embedding's output, where it is another one
    "token_dropout": 0.0,  # of whole tokens that are read, beside that
    "layer_dropout": 0.0,  # of a row's branches in the last layer, less before
    "decay": None,  # the one that is recommended
    "embedding_decay": 1.0,  # times that of the matrices
    "moving": True,  # each epoch is cut elsewhere
    "vocab_size": None,  # what suits the text
    "rate": 1.0,  # times the one that is recommended
    "batch": 1.0,  # times the one that is recommended, in tokens
    "growing_batch": False,  # half of it for the first half of the tokens
    "growing_context": False,  # a quarter of it for the first half of the tokens
    "scheduler": "linear",
    "averaged": 0,  # states of the constant rate whose mean the decay begins with
    "momentum": 0.95,  # Muon's
    "polar_express": False,  # coefficients of arXiv:2505.16932
    "embedding_std": None,  # of the first weights, where it is another one
    "zero": False,  # the matrices that end a branch begin at zero
    "bpe_dropout": 0.0,  # of merges, from the second epoch on
    "normuon": False,  # each row of an update has the size of its mean square (arXiv:2510.05491)
    "cautious": False,  # weights decay where the update has their sign (arXiv:2510.12402)
}
OF_MUON = ("momentum", "polar_express", "normuon", "cautious")
VARIANTS: dict[str, dict[str, Any]] = {
    "as before": {"shape": (64, 3, 2), "dropout": 0.2, "decay": 0.1, "moving": False},
    "decay 0.1": {"decay": 0.1},
    "decay 0.4": {"decay": 0.4},
    "decay 0.8": {"decay": 0.8},
    "decay 1.6": {"decay": 1.6},
    "decay 3.2": {"decay": 3.2},
    "cautious decay 1.6": {"decay": 1.6, "cautious": True},
    "fixed cuts": {"moving": False},
    "no dropout": {"dropout": 0.0},
    "dropout 0.2": {"dropout": 0.2},
    "dropout 0.3": {"dropout": 0.3},
    "3 x 64": {"shape": (64, 3, 2)},
    "4 x 96": {"shape": (96, 4, 3)},
    "4 x 192": {"shape": (192, 4, 3)},
    "7 x 96": {"shape": (96, 7, 3)},
    "six heads": {"shape": (96, 4, 6)},
    "rotary base 500": {"config": {"rope_theta": 500.0}},
    "head apart": {"config": {"tie_word_embeddings": False}},
    "embedding from 0.1": {"embedding_std": 0.1},
    "context 128": {"context": 128},
    "context 512": {"context": 512},
    "512 pieces": {"vocab_size": 512},
    "2,048 pieces": {"vocab_size": 2048},
    "2,560 pieces": {"vocab_size": 2560},
    "4,352 pieces": {"vocab_size": 4352},
    "branches from zero": {"zero": True},
    "BPE dropout 0.1": {"bpe_dropout": 0.1},
    "NorMuon": {"normuon": True},
    "half the rate": {"rate": 0.5},
    "twice the rate": {"rate": 2.0},
    "half the batch": {"batch": 0.5},
    "twice the batch": {"batch": 2.0},
    "a batch that grows": {"growing_batch": True},
    "a context that grows": {"growing_context": True},
    "wsd": {"scheduler": "wsd"},
    "wsd, three states averaged": {"scheduler": "wsd", "averaged": 3},
    "Polar Express": {"polar_express": True},
    "momentum 0.9": {"momentum": 0.9},
    "momentum 0.98": {"momentum": 0.98},
    "the embedding decays at a fifth": {"embedding_decay": 0.2},
    "the embedding decays at five times": {"embedding_decay": 5.0},
    "dropout of the embedding alone": {"dropout": 0.0, "embedding_dropout": 0.2},
    "dropout but of the embedding": {"embedding_dropout": 0.0},
    "one of ten tokens unseen": {"token_dropout": 0.1},
    "branches dropped": {"dropout": 0.0, "layer_dropout": 0.2},
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


# Of each step of Newton and Schulz: the best for what is left by those before (arXiv:2505.16932).
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


def polar_express(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """About the closest orthogonal matrix to (rows, columns)."""
    x = (matrix.mT if len(matrix) > matrix.shape[1] else matrix).to(dtype)
    x = x / (1.01 * x.norm()).clamp(min=1e-7)
    for step, (a, b, c) in enumerate(POLAR_EXPRESS):
        safety = 1.0 if step == len(POLAR_EXPRESS) - 1 else 1.01  # against bfloat16's rounding
        a, b, c = a / safety, b / safety**3, c / safety**5
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if len(matrix) > matrix.shape[1] else x).to(matrix.dtype)


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
                momentum = self.recipe["momentum"]
                moment = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                nesterov = weight.grad.lerp(moment, momentum)
                if self.recipe["polar_express"]:
                    update = polar_express(nesterov, self.dtype)
                else:
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


class Dropped(nn.Module):
    """Leaves out whole vectors, and scales the others: of tokens, or of a row's whole branch."""

    def __init__(self, rate: float, *, whole_rows: bool) -> None:
        super().__init__()
        self.rate, self.whole_rows = rate, whole_rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, width) to the same."""
        if not self.training:
            return x
        tokens = 1 if self.whole_rows else x.shape[1]
        return x * (torch.rand(len(x), tokens, 1) >= self.rate) / (1 - self.rate)


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
    rows = max(1, round(recipe["batch"] * batch_tokens(tokens, context) / context))
    steps = tokens // (rows * context)
    dim, n_layers, n_heads = recipe["shape"]
    config = LlamaConfig(
        vocab_size=tokenizer.n_words, dim=dim, n_layers=n_layers, n_heads=n_heads,
        max_seq_len=context, dropout=recipe["dropout"], **recipe["config"],
    )  # fmt: skip
    model = NextTokenLoss(Llama(config))
    for number, layer in enumerate(model.model.layers if recipe["layer_dropout"] else [], 1):
        dropped = Dropped(recipe["layer_dropout"] * number / n_layers, whole_rows=True)
        layer.attention.dropout = layer.feed_forward.dropout = dropped
    if recipe["embedding_dropout"] is not None:
        model.model.dropout.p = recipe["embedding_dropout"]
    if recipe["token_dropout"]:
        unseen = Dropped(recipe["token_dropout"], whole_rows=False)
        model.model.dropout = nn.Sequential(unseen, model.model.dropout)
    if recipe["embedding_std"] is not None:
        nn.init.normal_(model.model.tok_embeddings.weight, std=recipe["embedding_std"])
    if recipe["zero"]:
        for layer in model.model.layers:
            nn.init.zeros_(layer.attention.compute_output.weight)
            nn.init.zeros_(layer.feed_forward.w2.weight)
    lr, decay = recipe["rate"] * recommended_lr(config, "muon"), recipe["decay"]
    if decay is None:
        sizes = {"tokens": tokens, "distinct": len(stream), "batch": rows * context}
        decay = recommended_decay(lr, **sizes)
    optimizer = optimizers.make_optimizer(
        model, name="muon", lr=lr, weight_decay=decay, dtype=DTYPE
    )
    optimizer.parts["adamw"].param_groups[-1]["weight_decay"] *= recipe["embedding_decay"]
    if any(recipe[name] != BASE[name] for name in OF_MUON):
        optimizer.parts["muon"].__class__ = VariantMuon
        optimizer.parts["muon"].recipe = recipe
    numbers, rows_of = order(len(chunks), seed), [rows] * steps
    if recipe["growing_batch"]:
        rows_of[: steps // 2] = [rows // 2] * (2 * (steps // 2))
    total, warmup, read, means = sum(rows_of), round(0.05 * steps) * rows, 0, []
    decay_begins = warmup + (1 - optimizers.WSD_DECAY) * (total - warmup)
    schedule = {"peak_lr": lr, "min_lr": 0.0, "scheduler": recipe["scheduler"]}
    schedule |= {"total_steps": total, "warmup_steps": warmup}  # in rows
    with training_arithmetic(CPU, DTYPE, deterministic=False):
        for step, rows in enumerate(rows_of):
            batch = [next(numbers) for _ in range(rows)]
            if recipe["bpe_dropout"] and batch[0] // len(chunks) != batch[-1] // len(chunks):
                chunks = PretrainDataset(
                    documents(recipe["bpe_dropout"]), context, tokenizer=tokenizer, seed=seed
                )
                numbers = order(len(chunks), seed + step, first=1)
            if not recipe["moving"]:
                batch = [number % len(chunks) for number in batch]
            optimizers.set_learning_rate(optimizer, optimizers.learning_rate(read, **schedule))
            inputs = chunks.batch(batch)
            if recipe["growing_context"] and step < steps // 2:
                short = context // 4 if inputs[0].shape[1] == context else inputs[0].shape[1]
                inputs = tuple(tensor.reshape(-1, short) for tensor in inputs)
            with autocast(CPU, DTYPE):
                loss, count = model(*inputs)
            (loss / count).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            before, read = read, read + rows
            # Of the constant rate a tenth of the run apart, the last one where the decay begins.
            for back in range(recipe["averaged"]):
                if before < decay_begins - back * 0.1 * total <= read:
                    means.append([p.detach().clone() for p in model.parameters()])
                    if not back:
                        average(model, means)
    return bits_per_byte(model.eval(), PretrainDataset(held_out, context, tokenizer=tokenizer))


@torch.no_grad()
def average(model: nn.Module, states: list[list[torch.Tensor]]) -> None:
    """Give the model the mean of these states of its parameters."""
    for parameter, values in zip(model.parameters(), zip(*states, strict=True), strict=True):
        parameter.copy_(torch.stack(values).mean(0))


def order(count: int, seed: int, *, first: int = 0) -> Iterator[int]:
    """Numbers of chunks, epoch after epoch, as `PretrainDataset` numbers them."""
    epoch = first
    while True:
        yield from batch_indices(count, count, seed, epoch, 0).tolist()
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
    parser.add_argument("--shape", type=int, nargs=3, default=BASE["shape"], help="of the base")
    parser.add_argument("--dropout", type=float, default=BASE["dropout"], help="the base's")
    parser.add_argument("--decay", type=float, help="the base's; unset: the one recommended")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--work", type=Path, default=Path("recipes"), help="folder of vocabularies")
    parser.add_argument("--results", type=Path, default=Path("recipes.jsonl"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # several at once are faster than one with several threads
    BASE.update({name: getattr(args, name) for name in ("shape", "dropout", "decay")})
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
