"""Pretraining initialised from given weights: `--option pretrain --pretrained_model_path`.

It began from scratch without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from running import (
    assert_same_run,
    command,
    progress,
    stop_after,
    write_labelled,
    write_model,
    write_stories,
)

import check_model_precision
from config import CONTINUED_LR, LlamaConfig, recommended_lr
from llama import Llama, load_pretrained, model_payload
from minllama.formats.pt_file import load_pt, save_pt
from tokenizer import Tokenizer, train_vocabulary

SHORT = (
    "--option pretrain --pretrain_data text.jsonl --val_data text.jsonl --cache_dir cache "
    "--pretrain_batch_size 4 --max_seq_len 16 --max_steps 3 --dtype float32 --save_dir run"
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, with a text."""
    monkeypatch.chdir(tmp_path)
    write_stories(tmp_path)


def own_loss(path: str, tokenizer: Tokenizer) -> float:
    """Nats per token of the text in chunks of 16, by the whole logits of a model."""
    model, losses = load_pretrained(path), []
    texts = [json.loads(line)["text"] for line in Path("text.jsonl").read_text("utf-8").split("\n")
             if line]  # fmt: skip
    ids = [token for text in texts for token in tokenizer.encode(text, True, True)]
    for start in range(0, len(ids) - 1, 16):
        chunk = torch.tensor([ids[start : start + 17]])
        with torch.no_grad():
            logits = model.output(model.hidden_states(chunk[:, :-1]))[0]
        real = chunk[0, 1:] != tokenizer.bos_id
        losses.append(
            torch.nn.functional.cross_entropy(logits[real], chunk[0, 1:][real], reduction="none")
        )
    return torch.cat(losses).mean().item()


def convert(path: str, kind: str, output: str) -> str:
    assert check_model_precision.main([path, "--convert", kind, "--output", output]) == 0
    return output


@pytest.mark.parametrize("kind", ["pt", "checkpoint", "finetuned", "bin", "hf"])
def test_it_begins_with_the_weights_of_any_format(kind, capsys):
    """Before the first step the validation loss is the model's own."""
    words, path = "", str(write_model(Path.cwd(), seed=1))
    if kind == "checkpoint":
        assert command(f"{SHORT} --pretrained_model_path {path} --save_dir earlier").status == 0
        path = "earlier/pretrain-step-3.pt"
    if kind == "finetuned":
        labelled = write_labelled(Path.cwd())
        line = f"--option finetune --pretrained_model_path {path} {labelled} --max_steps 1"
        assert command(line).status == 0
        path = "checkpoints/finetune-toy-best-model.pt"
    if kind == "bin":  # carries no vocabulary
        Path("its.model").write_bytes(Tokenizer().model_bytes)
        path, words = convert(path, "bin", "other.bin"), "--tokenizer_model its.model"
    if kind == "hf":
        pytest.importorskip("safetensors")
        path = convert(path, "hf", "other")
    done = command(f"{SHORT} {words} --pretrained_model_path {path}")
    assert done.status == 0, done.error
    expected = own_loss(path, Tokenizer())
    assert f"before the first step: val loss {expected:.4f}" in done.out
    assert progress("run/pretrain-step-3.pt")["first"] == pytest.approx(expected, abs=1e-5)
    config = load_pretrained("run/final-model.pt").config
    assert (config.dim, config.n_layers, config.max_seq_len) == (32, 2, 128)
    assert progress("run/pretrain-step-3.pt")["best"] < expected


def write_other_model() -> Path:
    """A model with a vocabulary and a shape that are not the embedded ones."""
    train_vocabulary([Path("text.jsonl")], Path("other.model"), vocab_size=320)
    tokenizer = Tokenizer(tokenizer_model=Path("other.model"))
    torch.manual_seed(0)
    shape: dict[str, Any] = {"dim": 24, "n_layers": 1, "n_heads": 2, "tie_word_embeddings": False}
    model = Llama(LlamaConfig(vocab_size=320, max_seq_len=32, rope_theta=500.0, **shape))
    model.vocabulary = tokenizer.model_bytes
    save_pt(Path("other.pt"), model_payload(model))
    Path("other.model").unlink()
    return Path("other.pt")


def test_a_resumed_run_needs_no_starting_weights(monkeypatch):
    """Bit-equal, with shape and vocabulary of the file that is gone; of other weights, refused."""
    path = write_other_model()
    vocabulary = load_pretrained(path).vocabulary
    line = f"{SHORT} --pretrained_model_path {path} --dropout 0.1"
    assert command(f"{line} --save_dir whole").status == 0
    with monkeypatch.context() as patch:
        assert command(line, stop=stop_after(2, patch)).status == 130
    resume = "--option pretrain --save_dir run --cache_dir cache --max_steps 3 --resume auto"
    other = write_model(Path.cwd())
    done = command(f"{resume} --pretrained_model_path {other}")
    assert done.status == 2
    assert "--pretrained_model_path: SHA-256 of its weights" in done.error
    done = command(f"{resume} --pretrained_model_path {path} --plan")
    assert done.status == 0 and f"initialised from {path}" in done.out
    path.unlink()
    done = command(f"{resume} --pretrained_model_path {path}")  # the command of before, repeated
    assert done.status == 0 and "before the first step" not in done.out
    assert_same_run("whole", "run", "pretrain-step-3.pt")
    model = load_pretrained("run/final-model.pt")
    assert model.vocabulary == vocabulary and model.config.rope_theta == 500
    assert model.config.dropout == 0.1 and not model.config.tie_word_embeddings


def test_a_run_from_scratch_is_not_resumed_from_weights():
    """They would not be used."""
    model = write_model(Path.cwd())
    assert command(f"{SHORT} --dim 32 --n_layers 2 --n_heads 2").status == 0
    resume = "--option pretrain --save_dir run --cache_dir cache --resume auto"
    done = command(f"{resume} --pretrained_model_path {model}")
    assert done.status == 2 and "SHA-256 of its weights" in done.error


@pytest.mark.parametrize(
    ("words", "has"),
    [
        ("--dim 64 --n_layers 2", "dim 32 (not 64):"),
        ("--n_layers 3 --n_heads 4", "n_layers 2 (not 3), n_heads 2 (not 4):"),
        ("--model_size stories15M", "dim 32 (not 288), n_layers 2 (not 6)"),
    ],
)
def test_another_shape_than_the_models_is_one_error(words, has):
    """The weights would not fit it."""
    path = write_model(Path.cwd())
    done = command(f"{SHORT} --pretrained_model_path {path} {words}")
    assert done.status == 2 and f"--pretrained_model_path {path} has {has}" in done.error
    assert done.error.count("\n") == 1 and not Path("run/run.json").exists()


def test_the_models_own_shape_may_be_named():
    """Nothing contradicts it."""
    path = write_model(Path.cwd())
    words = "--dim 32 --n_layers 2 --n_heads 2 --plan"
    assert command(f"{SHORT} --pretrained_model_path {path} {words}").status == 0


@pytest.mark.parametrize(
    ("words", "context", "chunk"), [("", 128, 128), ("--max_seq_len 256", 256, 256)]
)
def test_chunks_fill_the_context_which_may_grow(words, context, chunk):
    """Unset, --max_seq_len is no longer than the model's context; typed, it makes that longer."""
    path = write_model(Path.cwd())
    line = SHORT.replace("--max_seq_len 16 ", "")
    done = command(f"{line} --pretrained_model_path {path} {words}")
    assert done.status == 0 and f"chunks of up to {chunk}" in done.out
    assert ("made longer than its 128" in done.out) == (context > 128)
    assert load_pretrained("run/final-model.pt").config.max_seq_len == context


def test_the_learning_rate_suits_the_models_size():
    """A fifth of that of the nearest preset, for weights that were trained have something to lose.

    A --min_lr above it is found before the text is read.
    """
    sizes = [dict(dim=64, n_heads=2, n_layers=2), dict(dim=512), dict(dim=2048, n_layers=22)]
    rates = [
        CONTINUED_LR * recommended_lr(LlamaConfig(vocab_size=32000, **size), "adamw")
        for size in sizes
    ]
    assert rates == pytest.approx([1e-3, 1e-4, 8e-5])
    path = write_model(Path.cwd())
    line = f"{SHORT} --pretrained_model_path {path}"
    done = command(f"{line} --plan")
    assert "learning rate up to 0.001 (--pretrain_lr)" in done.out
    done = command(f"{line} --min_lr 0.002 --pretrain_data missing.txt")
    assert done.status == 2 and "--min_lr 0.002 is above --pretrain_lr 0.001" in done.error
    assert command(f"{line} --pretrain_lr 0.003").status == 0
    assert load_pt("run/pretrain-step-3.pt")["options"]["pretrain_lr"] == 0.003


def test_the_plan_for_other_machines_is_of_the_model():
    """--world_size plans for the file's shape, too."""
    path = write_model(Path.cwd())
    done = command(f"{SHORT} --pretrained_model_path {path} --plan --world_size 8")
    assert done.status == 0 and "dim 32, 2 layers" in done.out


@pytest.mark.parametrize("named", ["run/final-model.pt", "run"])
def test_overwrite_does_not_remove_what_it_starts_from(named):
    """`--pretrained_model_path checkpoints --overwrite` would have deleted the weights."""
    path = write_model(Path.cwd())
    assert command(f"{SHORT} --pretrained_model_path {path}").status == 0
    before = Path("run/final-model.pt").read_bytes()
    done = command(f"{SHORT} --pretrained_model_path {named} --overwrite")
    assert done.status == 2 and done.error.count("\n") == 1
    assert f"--overwrite would remove --pretrained_model_path {named}" in done.error
    assert Path("run/final-model.pt").read_bytes() == before
    assert command(f"{SHORT} --pretrained_model_path {named} --save_dir run2").status == 0
