"""Small models with telling weights, and what other programs call their tensors."""

from __future__ import annotations

from pathlib import Path

import torch

from config import LlamaConfig
from llama import Llama, load_pretrained
from minllama.formats.export import export
from minllama.formats.hugging_face import tensor_name
from tokenizer import Tokenizer


def make_llama(config: LlamaConfig, seed: int = 0) -> Llama:
    """A model whose weights are large enough for every token to matter, norms included."""
    torch.manual_seed(seed)
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=0.15)
    return model.eval()


def make_model(tokenizer: Tokenizer | None = None, **changes) -> Llama:
    """Small, with grouped-query attention, and float32 numbers that no other dtype holds."""
    torch.manual_seed(0)
    shape = {"vocab_size": tokenizer.n_words if tokenizer else 300, "max_seq_len": 40, "dim": 48}
    shape |= {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    model = Llama(LlamaConfig(**(shape | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(0.01 * torch.randn_like(parameter))
    model.vocabulary = tokenizer.model_bytes if tokenizer else None
    return model.eval()


def to_hugging_face(model: Llama) -> dict[str, torch.Tensor]:
    """A state dict for `transformers`, written with loops instead of the program's reshapes."""
    config, state = model.config, {}
    size = config.head_dim
    for name, tensor in model.state_dict().items():
        tensor = tensor.clone()
        parts = {"compute_query": config.n_heads, "compute_key": config.n_kv_heads}
        for part, heads in (parts | {"query_norm": 1, "key_norm": 1}).items():
            if part in name:
                order = [
                    head * size + pair * 2 + half
                    for head in range(heads)
                    for half in range(2)
                    for pair in range(size // 2)
                ]
                tensor = tensor[order]
        state[tensor_name(name)] = tensor
    return state


def assert_same_weights(got: Llama, want: Llama) -> None:
    """Same shape, same names, same float32 numbers, tied alike."""
    assert got.config == want.config
    assert {*got.state_dict()} == {*want.state_dict()}
    for name, tensor in want.state_dict().items():
        assert got.state_dict()[name].dtype == torch.float32
        assert torch.equal(got.state_dict()[name], tensor), name
    assert (got.output.weight is got.tok_embeddings.weight) == want.config.tie_word_embeddings


def write(model: Llama, target: str, output: Path, *, dtype: str = "float32", tokenizer=None):
    """Export a model; the paths written."""
    return export(model, target, output, dtype=dtype, tokenizer=tokenizer, extra={})


def assert_holds(path: Path, want: dict[str, torch.Tensor]) -> None:
    """The model in a file has exactly these tensors."""
    got = load_pretrained(path).state_dict()
    assert {*got} == {*want}
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())
