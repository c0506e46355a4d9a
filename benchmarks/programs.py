"""The models that the benchmarks compare: ours and other programs', of the same shapes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SHAPES = {  # dim, layers, heads, vocabulary, sequence length, batch
    "S": (288, 6, 6, 32000, 256, 8),
    "T": (128, 4, 4, 4096, 256, 16),
    "M": (512, 8, 8, 32000, 1024, 2),
}


def our_model(shape: str) -> Any:
    """Our Llama of a shape, with our optimizer."""
    import torch

    from config import LlamaConfig
    from llama import Llama

    dim, layers, heads, vocabulary, length, _ = SHAPES[shape]
    torch.manual_seed(0)
    return Llama(
        LlamaConfig(
            dim=dim, n_layers=layers, n_heads=heads, vocab_size=vocabulary, max_seq_len=length
        )
    )


def hugging_face_model(shape: str) -> Any:
    """transformers' Llama of the same shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = our_model(shape).config
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=ours.vocab_size,
            hidden_size=ours.dim,
            intermediate_size=ours.hidden_dim,
            num_hidden_layers=ours.n_layers,
            num_attention_heads=ours.n_heads,
            max_position_embeddings=ours.max_seq_len,
            rms_norm_eps=ours.layer_norm_eps,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=None,
        )
    )


def llama2c_model(shape: str, checkout: Path) -> Any:
    """llama2.c's own model of the same shape, from a checkout."""
    spec = importlib.util.spec_from_file_location("llama2c_model", checkout / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dim, layers, heads, vocabulary, length, _ = SHAPES[shape]
    arguments = module.ModelArgs(
        dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=heads, vocab_size=vocabulary,
        multiple_of=32, max_seq_len=length, dropout=0.0,
    )  # fmt: skip
    return module.Transformer(arguments)
