"""What is trained: a task's model, batches, loss and evaluation, as the train loop asks for them.

`run_llama.py` has the two tasks, pretraining and finetuning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from config import IGNORE_INDEX
from llama import Llama
from minllama.ranks import Ranks


@dataclass(frozen=True)
class Batch:
    """A micro-batch on the device: what the loss takes, and the targets it sums over."""

    inputs: tuple[torch.Tensor, ...]  # a row for each sequence
    targets: int
    tokens: int
    numbers: Sequence[int] = ()  # the sequences' places in the data set

    def parts(self, count: int) -> list[tuple[torch.Tensor, ...]]:
        """The inputs in `count` parts of about as many rows, fewer where there are fewer rows."""
        rows = -(-len(self.inputs[0]) // count)
        return list(zip(*(tensor.split(rows) for tensor in self.inputs), strict=True))

    def without_targets(self) -> Batch:
        """Its first row with nothing to predict: for a rank to take part in a pass of the others.

        The last of the inputs are the targets or labels.
        """
        *inputs, targets = (tensor[:1] for tensor in self.inputs)
        return Batch((*inputs, torch.full_like(targets, IGNORE_INDEX)), targets=0, tokens=0)


def share_batches(
    parts: Sequence[Sequence[int]], ranks: Ranks, make: Callable[[Sequence[int]], Batch]
) -> list[Batch]:
    """This rank's micro-batches of a window's, as many on every rank.

    A rank with one fewer than others gets one without targets: all take part in every pass.
    """
    return [
        make(parts[number]) if counts else make(parts[number][:1]).without_targets()
        for number, counts in ranks.split_evenly(len(parts))
    ]


class Task(ABC):
    """What pretraining and finetuning do not share: model, batches, loss, evaluation."""

    llama: Llama  # its shape and vocabulary travel with every file
    model: nn.Module  # whose parameters are trained and checkpointed: the Llama, or around it
    parallel: nn.Module  # what `loss` calls: the model as `distribute` returned it
    goal: str  # the metric that chooses the best model
    higher_is_better: bool = False
    best_interval: int = 1  # epochs between looks for a new best
    eval_interval: int = 0  # optimizer steps between evaluations; 0: at the ends of epochs only
    patience: int | None = None  # epochs without a new best after which to stop

    @abstractmethod
    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step`, equally many on all ranks."""

    @abstractmethod
    def loss(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The sum of the losses of a micro-batch's targets, on its inputs."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Metrics, the goal among them; empty without data to evaluate on. All ranks call it."""

    @abstractmethod
    def weights(self) -> dict[str, Any]:
        """The content of a weights file, on rank 0. All ranks call it."""

    @abstractmethod
    def locate(self, number: int) -> str:
        """Where sequence `number` of the data set is, for messages."""
