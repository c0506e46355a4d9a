"""LoRA: low-rank adapters beside a frozen Llama's linear layers, and folding them in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import Llama


class LoRALinear(nn.Linear):
    """A frozen linear layer plus a trained product of two thin matrices (arXiv:2106.09685).

    y = W x + alpha / rank * B A x; B starts at zero, so training starts at W. A bias stays as it
    is, as frozen as W.
    """

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: the weight is there already
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scaling = alpha / rank
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(self.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        thin = F.linear(x, self.lora_a) * self.scaling  # (..., rank)
        return F.linear(x, self.weight, self.bias) + F.linear(thin, self.lora_b)

    def merged(self) -> nn.Linear:
        """The ordinary layer that computes the same."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        with torch.no_grad():
            self.weight += self.scaling * (self.lora_b @ self.lora_a)
        linear.weight, linear.bias = self.weight, self.bias
        return linear


def add_lora(model: Llama, *, rank: int, alpha: float | None = None) -> None:
    """Freeze the model and give every linear layer except the head an adapter to train.

    `alpha` / rank scales what an adapter adds; unset it is 2.
    """
    alpha = 2 * rank if alpha is None else alpha
    model.requires_grad_(False)
    for parent, name, linear in linears(model):
        setattr(parent, name, LoRALinear(linear, rank=rank, alpha=alpha))


def merge_lora(model: Llama) -> None:
    """Fold the adapters into the weights: the model's tensors are the ordinary ones again."""
    for parent, name, linear in linears(model):
        if isinstance(linear, LoRALinear):
            setattr(parent, name, linear.merged())
    model.requires_grad_(True)


def linears(model: Llama) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Every linear layer inside the layers, with the module that has it and its name there."""
    for parent in itertools.chain.from_iterable(layer.children() for layer in model.layers):
        for name, child in list(parent.named_children()):  # a list: the caller replaces them
            if isinstance(child, nn.Linear):
                yield parent, name, child
