"""Other programs trained on a text for some minutes: what quality.py measures ours against.

Each trains in a copy of its checkout by its own script, with as many iterations as fit the minutes,
timed before in seconds that do not count.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from programs import model_module, run
from torch.nn import functional as F


def iterations_in(minutes: float, seconds_of: Callable[[int], float], pilot: int) -> int:
    """Iterations that fit the minutes, by the time that `pilot` and three times as many take.

    What does not depend on them (starting, the first evaluation) is counted, the last one's too.
    """
    few, more = seconds_of(pilot), seconds_of(3 * pilot)
    an_iteration = max(1e-4, (more - few) / (2 * pilot))
    fixed = max(0.0, few - pilot * an_iteration)
    return max(4, int((60 * minutes - 2 * fixed) / an_iteration))


def windows(ids: np.ndarray, size: int) -> Iterator[torch.Tensor]:
    """ids (n,) in rows (1, size + 1 or less), each beginning with the last one's end."""
    ids = torch.from_numpy(ids.astype(np.int64))
    for at in range(0, len(ids) - 1, size):
        yield ids[None, at : at + size + 1]


# ---------------------------------------------------------------------------- nanoGPT

COMMON = "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20".split()
NANOGPT_CPU = (
    "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0"
).split()  # its README's for a CPU; without these it is the larger recipe, for a GPU


def train_nanogpt(
    checkout: Path, train: str, val: str, minutes: float, *, recipe: list[str]
) -> float:
    """Train letter by letter, as its data/shakespeare_char does; bits per byte of `val`."""
    folder = checkout / "data" / "text"
    letters = sorted({*train, *val})
    index = {letter: i for i, letter in enumerate(letters)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("train", train), ("val", val)):
        np.array([index[letter] for letter in text], np.uint16).tofile(folder / f"{name}.bin")
    meta = {"vocab_size": len(letters), "stoi": index, "itos": dict(enumerate(letters))}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))

    def seconds_of(iterations: int, every: int = 10**6) -> float:
        lengths = [f"--max_iters={iterations}", f"--lr_decay_iters={iterations}"]
        words = [*COMMON, *recipe, *lengths, f"--eval_interval={every}", "--dataset=text"]
        started = time.perf_counter()
        run("train.py", *words, "--out_dir=out", "--always_save_checkpoint=True", cwd=checkout)
        return time.perf_counter() - started

    every = iterations_in(minutes, seconds_of, pilot=40) // 4
    seconds_of(4 * every, every)
    module = model_module(checkout)
    saved = torch.load(checkout / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its size
        model = module.GPT(module.GPTConfig(**saved["model_args"]))
    model.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in saved["model"].items()})
    model.eval()
    nats = 0.0
    with torch.inference_mode():
        ids = np.fromfile(folder / "val.bin", np.uint16)
        for row in windows(ids, saved["model_args"]["block_size"]):
            logits, _ = model(row[:, :-1], row[:, 1:])
            nats += F.cross_entropy(logits[0], row[0, 1:], reduction="sum").item()
    return nats / math.log(2) / len(val.encode())


# ---------------------------------------------------------------------------- llama2.c

VOCABULARY = 4096  # its README's for a custom one; more where a text has more characters
# What a CPU needs of its train.py: else a step is 131,072 tokens and an evaluation 6.5 million.
ON_CPU = (
    "--device=cpu --dtype=float32 --compile=False --gradient_accumulation_steps=1 --batch_size=16 "
    "--eval_iters=2 --always_save_checkpoint=True --vocab_source=custom"
).split()


def train_llama2c(checkout: Path, train: str, val: str, minutes: float) -> float:
    """Train with a vocabulary of the text's own and its other defaults; bits per byte of `val`."""
    size = VOCABULARY
    while size < 1.2 * len({*train}):
        size *= 2
    folder, pieces = checkout / "data" / f"tok{size}", checkout / "data" / f"tok{size}.model"
    folder.mkdir(parents=True, exist_ok=True)
    text = checkout / "data" / "train.txt"
    text.write_text(train, encoding="utf-8", newline="")
    started = time.perf_counter()
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(pieces.with_suffix("")),
        model_type="bpe",
        vocab_size=size,
        character_coverage=1.0,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        normalization_rule_name="identity",
        max_sentence_length=1 << 20,
        minloglevel=2,
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    for name, part in (("0-val", val), ("1-train", train)):  # the first file is its validation
        ids = [tokenizer.bos_id(), *tokenizer.encode(part)]
        np.array(ids, np.uint16).tofile(folder / f"{name}.bin")
    minutes -= (time.perf_counter() - started) / 60

    def seconds_of(iterations: int, every: int = 10**6) -> float:
        lengths = [f"--max_iters={iterations}", f"--warmup_iters={max(1, iterations // 20)}"]
        started = time.perf_counter()
        run("train.py", *ON_CPU, *lengths, f"--eval_interval={every}", f"--vocab_size={size}",
            "--out_dir=out", cwd=checkout)  # fmt: skip
        return time.perf_counter() - started

    every = iterations_in(minutes, seconds_of, pilot=3)
    seconds_of(every, every)
    module = model_module(checkout)
    saved = torch.load(checkout / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
    model = module.Transformer(module.ModelArgs(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    nats = 0.0
    with torch.inference_mode():
        ids = np.fromfile(folder / "0-val.bin", np.uint16)
        for row in windows(ids, saved["model_args"]["max_seq_len"]):
            logits = model(row[:, :-1].contiguous(), row[:, 1:].contiguous())
            nats += F.cross_entropy(logits[0], row[0, 1:], reduction="sum").item()
    return nats / math.log(2) / len(val.encode())
