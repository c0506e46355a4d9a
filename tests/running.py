"""Small runs of the command in this process, for the tests of the options and of what trains."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
from hurried import hurried

import run_llama
from config import LlamaConfig, parse_options
from llama import Llama, model_payload
from minllama.formats.pt_file import save_pt
from minllama.inference import streaming
from minllama.runs.checkpoints import load_checkpoint
from minllama.system.signals import StopRequest
from minllama.training import loop, pretraining, task
from minllama.training.loop import Prefetch
from tokenizer import EMBEDDED_VOCABULARY, Tokenizer

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--dim 16 --n_layers 1 --n_heads 2 --n_kv_heads 1 --max_seq_len 16 --pretrain_batch_size 4 "
    "--dtype float32 --save_dir run --cache_dir cache --pretrain_lr 0.01 --sample_tokens 4"
).split() + ["--tokenizer_model", str(EMBEDDED_VOCABULARY)]
RESUME = "--option pretrain --save_dir run --cache_dir cache --resume auto"
# In records: what a machine needs, not what it did.
TIMED = {"elapsed", "tokens_per_second", "mfu", "memory"}


def sample_text(model: Llama, tokenizer: Tokenizer, *prompt: str, **settings: Any) -> str:
    """The samples of a run; without the long one after it."""
    return streaming.sample_text(model, tokenizer, *prompt, **settings) if settings else "One day."


class Done(NamedTuple):
    """How a command ended, and what it printed."""

    status: int
    out: str
    error: str


def command(line: str | list[str], *, stop: StopRequest | None = None) -> Done:
    """Run a command in this process and in the folder where the test is."""
    words = line.split() if isinstance(line, str) else line
    out, error = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
        mock.patch.object(sys, "argv", ["run_llama.py", *words]),
        mock.patch.object(pretraining, "sample_text", sample_text),
        hurried(),
    ):
        status = run_llama.main(parse_options(words), stop)
    return Done(status, out.getvalue(), error.getvalue())


def pretrain(line: str = "", *, stop: StopRequest | None = None) -> Done:
    """A small pretraining on text.jsonl into the folder run, unless the line says otherwise."""
    words = ["--option", "pretrain", "--pretrain_data", "text.jsonl", *SMALL, *line.split()]
    return command(words, stop=stop)


def stop_after(step: int, patch: pytest.MonkeyPatch) -> StopRequest:
    """A stop request that comes while optimizer step number `step` is made."""
    stop, real = StopRequest(), loop.optimizer_step

    def optimizer_step(run: loop.Run, batches: loop.Prefetch) -> dict[str, Any]:
        record = real(run, batches)
        if record["step"] == step:
            stop.signal_number = signal.SIGINT
        return record

    patch.setattr(loop, "optimizer_step", optimizer_step)
    return stop


def evaluate_as(patch: pytest.MonkeyPatch, *losses: float) -> None:
    """Validate without validating: each evaluation finds the next of these losses."""
    found = iter(losses)
    patch.setattr(task, "evaluate_tokens", lambda *_: {"val_loss": next(found)})


def read_ahead(patch: pytest.MonkeyPatch) -> None:
    """Have each step's batches made in a thread while the one before runs, as for a GPU."""
    patch.setattr(loop, "Prefetch", lambda make, *, enabled: Prefetch(make, enabled=True))


def records(name: str = "run/metrics.jsonl") -> list[dict[str, Any]]:
    """The records of a run, one for each step."""
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def steps(name: str = "run/metrics.jsonl") -> list[int]:
    """The steps that a run has on record, in the file's order."""
    return [record["step"] for record in records(name)]


def progress(name: str) -> dict[str, Any]:
    """The progress that a checkpoint holds."""
    return load_checkpoint(Path(name))["progress"]


def assert_same(a: Any, b: Any, path: str = "") -> None:
    """Nested tensors and plain values are equal bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


def assert_same_run(one: str, other: str, checkpoint: str, metrics: str = "metrics.jsonl") -> None:
    """Two run folders hold the same training: its state bit for bit, and its records."""
    a, b = (load_checkpoint(Path(folder, checkpoint)) for folder in (one, other))
    for part in ("model", "optimizer", "scaler", "rng", "progress"):
        assert_same(a[part], b[part], part)
    lines = [
        [{key: value for key, value in record.items() if key not in TIMED} for record in of]
        for of in (records(f"{one}/{metrics}"), records(f"{other}/{metrics}"))
    ]
    assert lines[0] == lines[1]


def write_stories(folder: Path, count: int = 4) -> Path:
    """A few of the embedded stories as text.jsonl; four are about 54 chunks of 16 tokens."""
    lines = (ROOT / "data" / "stories-train.jsonl").read_text(encoding="utf-8").splitlines()
    path = folder / "text.jsonl"
    path.write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
    return path


def write_model(folder: Path, *, seed: int = 0, **shape: Any) -> Path:
    """A small untrained model with the embedded vocabulary."""
    tokenizer = Tokenizer()
    settings = {"dim": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 128} | shape
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(vocab_size=tokenizer.n_words, **settings))
    model.vocabulary = tokenizer.model_bytes
    save_pt(folder / "model.pt", model_payload(model))
    return folder / "model.pt"


ANIMALS = {"fox": "den", "bear": "cave", "mouse": "hole", "otter": "lodge", "mole": "burrow"}


def write_dialogues(folder: Path, name: str = "chat.jsonl") -> Path:
    """Fifteen short dialogues about where animals live, five of them of two questions."""
    lines = []
    for kind, home in ANIMALS.items():
        answer = f"A {kind} lives in a {home}."
        said = ["Hello!", "Hello.", f"What is the home of a {kind}?", answer]
        roles = ["user", "assistant"] * 2
        turns = [{"role": r, "content": text} for r, text in zip(roles, said, strict=True)]
        lines += [
            {"prompt": f"Where does a {kind} live?", "response": answer},
            {"prompt": f"The home of a {kind}?", "response": answer},
            {"conversations": turns},
        ]
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_labelled(folder: Path) -> str:
    """Small labelled files, a word of which decides the label; returns the flags for them."""
    words = ["awful", "average", "excellent"]
    for split, size in (("train", 60), ("dev", 21), ("test", 9)):
        lines = [f"{i % 3} ||| The film number {i} is {words[i % 3]} ." for i in range(size)]
        (folder / f"toy-{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "toy-label-mapping.json").write_text(json.dumps(words), encoding="utf-8")
    return "--train toy-train.txt --dev toy-dev.txt --test toy-test.txt"
