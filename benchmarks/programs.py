"""The models that the benchmarks compare: ours and other programs', of the same shapes."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def run(*words: object, cwd: Path = ROOT) -> str:
    """Run a script; returns what it printed, and ends this program where it failed."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


class Shape(NamedTuple):
    """A model, and the batch that it is trained on."""

    dim: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    batch: int
    kv_heads: int | None = None  # None: as many as heads
    hidden: int | None = None  # None: 8/3 of dim, rounded up to 32
    accumulated: int = 1  # batches of a whole run's step


SHAPES = {
    "S": Shape(288, 6, 6, 32000, 256, 8),
    "T": Shape(128, 4, 4, 4096, 256, 16),
    "M": Shape(512, 8, 8, 32000, 1024, 2),
}
GPU_SHAPES = {  # whose steps keep a GPU busy
    "110M": Shape(768, 12, 12, 32000, 1024, 32),
    "1.1B": Shape(2048, 22, 32, 32000, 2048, 4, kv_heads=4, hidden=5632, accumulated=8),
}


def our_config(name: str) -> Any:
    """A shape as our Llama has it."""
    from config import LlamaConfig

    shape = (SHAPES | GPU_SHAPES)[name]
    return LlamaConfig(
        dim=shape.dim, n_layers=shape.layers, n_heads=shape.heads, n_kv_heads=shape.kv_heads,
        hidden_dim=shape.hidden, vocab_size=shape.vocabulary, max_seq_len=shape.length,
    )  # fmt: skip


def our_model(name: str) -> Any:
    """Our Llama of a shape."""
    import torch

    from llama import Llama

    torch.manual_seed(0)
    return Llama(our_config(name))


def hugging_face_model(shape: str) -> Any:
    """transformers' Llama of the same shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = our_config(shape)
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=ours.vocab_size,
            hidden_size=ours.dim,
            intermediate_size=ours.hidden_dim,
            num_hidden_layers=ours.n_layers,
            num_attention_heads=ours.n_heads,
            num_key_value_heads=ours.n_kv_heads,
            max_position_embeddings=ours.max_seq_len,
            rms_norm_eps=ours.layer_norm_eps,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=None,
        )
    )


def model_module(checkout: Path) -> Any:
    """The model.py of another program's checkout, as a module."""
    name = f"{checkout.name}_model"
    spec = importlib.util.spec_from_file_location(name, checkout / "model.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def llama2c_model(name: str, checkout: Path) -> Any:
    """llama2.c's own model of the same shape, from a checkout."""
    module, shape = model_module(checkout), (SHAPES | GPU_SHAPES)[name]
    arguments = module.ModelArgs(
        dim=shape.dim, n_layers=shape.layers, n_heads=shape.heads, hidden_dim=shape.hidden,
        n_kv_heads=shape.kv_heads or shape.heads, vocab_size=shape.vocabulary, multiple_of=32,
        max_seq_len=shape.length, dropout=0.0,
    )  # fmt: skip
    return module.Transformer(arguments)


def nanogpt_model(name: str, checkout: Path) -> Any:
    """nanoGPT's GPT of as many layers, heads and dimensions, whose parameters are about as many."""
    module, shape = model_module(checkout), (SHAPES | GPU_SHAPES)[name]
    arguments = module.GPTConfig(
        block_size=shape.length, vocab_size=shape.vocabulary, n_layer=shape.layers,
        n_head=shape.heads, n_embd=shape.dim, dropout=0.0, bias=False,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its size
        return module.GPT(arguments)
