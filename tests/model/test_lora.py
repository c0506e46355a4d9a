"""LoRA: where it starts, what it trains, and what is left when it is folded in."""

from __future__ import annotations

import torch
from oracles import make_llama

from config import LlamaConfig
from llama import Llama
from minllama.model.lora import add_lora, merge_lora


def disturb(model: Llama) -> None:
    """Change what is trained, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def test_lora_starts_at_the_model_trains_and_merges_into_ordinary_weights(tiny_config: LlamaConfig):
    """Merged, the file holds the ordinary tensors, and the model computes what the adapters did."""
    model, tokens = make_llama(tiny_config), torch.randint(64, (2, 9))
    plain, names = model(tokens, tokens)[0], list(model.state_dict())
    add_lora(model, rank=4, alpha=8.0)
    torch.testing.assert_close(model(tokens, tokens)[0], plain, rtol=0, atol=0)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * tiny_config.n_layers and all("lora_" in name for name in trained)
    model.train().loss(tokens, tokens)[0].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name)
    disturb(model)
    adapted = model.eval()(tokens, tokens)[0]
    assert not torch.allclose(adapted, plain, atol=0.1)
    merge_lora(model)
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(tokens, tokens)[0], adapted, rtol=1e-4, atol=1e-4)


def test_lora_adds_the_product_of_its_matrices_scaled(tiny_config: LlamaConfig):
    """The oracle is the paper's formula, W + alpha / rank * B A, on every adapted layer."""
    model = make_llama(tiny_config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_lora(model, rank=4, alpha=6.0)
    disturb(model)
    adapters = {
        name.removesuffix(".lora_a"): (tensor, model.get_parameter(name[:-1] + "b"))
        for name, tensor in model.named_parameters()
        if name.endswith(".lora_a")
    }
    want = {
        f"{name}.weight": before[f"{name}.weight"] + 6.0 / 4 * (b @ a)
        for name, (a, b) in adapters.items()
    }
    merge_lora(model)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, want.get(name, before[name]))
    assert not any("layers" not in name for name in want)  # embedding and head stay as they are
