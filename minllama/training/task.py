"""What is trained: a task's model, batches, loss and evaluation, as the train loop asks for them.

The tasks: pretraining and classification in `run_llama.py`, dialogues in `chat_training`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from config import IGNORE_INDEX
from llama import Llama, model_payload
from minllama.machine.device import autocast
from minllama.machine.random_state import random_state, restore_random_state
from minllama.machine.sharding import distribute, full_state_dict
from minllama.model.lora import merge_lora
from minllama.training.session import Session


@dataclass(frozen=True)
class Batch:
    """A micro-batch: what the loss takes, a row for each sequence; the targets or labels last."""

    inputs: tuple[torch.Tensor, ...]

    def pinned(self) -> Batch:
        """A copy in memory that a GPU reads by itself."""
        return Batch(tuple(tensor.pin_memory() for tensor in self.inputs))

    def to(self, device: torch.device) -> Batch:
        """A copy on the device, to a GPU without waiting."""
        if device.type != "cuda":
            return Batch(tuple(tensor.to(device) for tensor in self.inputs))
        pinned = self.pinned()
        return Batch(tuple(tensor.to(device, non_blocking=True) for tensor in pinned.inputs))

    def parts(self, count: int) -> list[tuple[torch.Tensor, ...]]:
        """The inputs in `count` parts of about as many rows, fewer where there are fewer rows."""
        rows = -(-len(self.inputs[0]) // count)
        return list(zip(*(tensor.split(rows) for tensor in self.inputs), strict=True))

    def without_targets(self) -> Batch:
        """Its first row with nothing to predict: for a rank that only joins in the others' pass."""
        *inputs, targets = (tensor[:1] for tensor in self.inputs)
        return Batch((*inputs, torch.full_like(targets, IGNORE_INDEX)))


@dataclass(frozen=True)
class Window:
    """An accumulation window: what one optimizer step trains on."""

    numbers: np.ndarray  # of the sequences of all ranks, their places in the data set
    targets: int  # of all ranks, that the loss is the mean over
    tokens: int  # read by all ranks
    batches: list[Batch]  # this rank's micro-batches, in the CPU's memory


class Task(ABC):
    """What the tasks do not share: model, batches, loss, evaluation."""

    goal: str  # the metric that chooses the best model
    higher_is_better: bool = False
    best_interval: int = 1  # epochs between looks for a new best; 0: epochs are not evaluated
    eval_interval: int = 0  # optimizer steps between evaluations; 0: at the ends of epochs only
    split: int = 1  # parts in which the train loop passes a micro-batch to `loss`

    def __init__(
        self,
        session: Session,
        llama: Llama,
        model: nn.Module,
        *,
        module: nn.Module,
        dtype: torch.dtype,
        dynamic: bool,
    ) -> None:
        """`model`, the Llama or around it, is what is trained; `module` is what `loss` calls.

        `dtype` is that of FSDP's gathered weights; `dynamic`: sequences differ in length.
        """
        options, self.session = session.options, session
        self.llama, self.model = llama, model  # the Llama's shape travels with every file
        llama.activation_checkpointing = options.activation_checkpointing
        self.parallel = distribute(
            module,
            llama.materialized_layers(),
            ranks=session.ranks,
            parallel=options.parallel,
            device=session.device,
            dtype=dtype,
        )
        # Whether its passes draw random numbers.
        self.draws = any(isinstance(part, nn.Dropout) and part.p > 0 for part in model.modules())
        self.compiled = self.parallel
        if options.compile == "on":
            self.compiled = torch.compile(self.parallel, dynamic=dynamic)

    def window(self, step: int) -> Window:
        """What optimizer step `step` trains on, by its number alone; any thread may make it.

        All ranks have equally many micro-batches: one with one fewer gets one without targets, and
        takes part in every pass. Raises TextLost.
        """
        options, device = self.session.options, self.session.device
        numbers = self.sequences(*divmod(step, self.session.plan.steps_per_epoch))
        size = options.micro_batch_size
        parts = np.split(numbers, range(size, len(numbers), size))
        batches = [
            self.batch(parts[part]) if counts else self.batch(parts[part][:1]).without_targets()
            for part, counts in self.session.ranks.split_evenly(len(parts))
        ]
        if device.type == "cuda":
            with torch.cuda.device(device):  # another thread's is the first GPU
                batches = [batch.pinned() for batch in batches]
        return Window(numbers, *self.count(numbers), batches)

    def warm_up_gradient_sync(self, step: int) -> None:
        """Pass once through several ranks' reduction of gradients, training nothing.

        After its first pass DDP rebuilds its buckets, and the order in which floating-point numbers
        are added up depends on their place in a bucket. Done before the first `step`, also of a
        resumed run, every step of both adds in the same order, and their weights are the same bit
        for bit.
        """
        if self.session.ranks.world_size == 1:
            return
        random_before = random_state()
        batch = self.window(step).batches[0].without_targets().to(self.session.device)
        with autocast(self.session.device, self.session.dtype):
            loss = self.loss(*batch.inputs)
        loss.backward()
        self.model.zero_grad(set_to_none=True)
        restore_random_state(random_before)

    @abstractmethod
    def sequences(self, epoch: int, index: int) -> np.ndarray:
        """The numbers of the sequences of an epoch's step `index`, the same on all ranks."""

    @abstractmethod
    def batch(self, numbers: np.ndarray) -> Batch:
        """These sequences of the training data as a micro-batch in the CPU's memory."""

    @abstractmethod
    def count(self, numbers: np.ndarray) -> tuple[int, int]:
        """The targets and the tokens of these sequences, which other ranks may train on."""

    @abstractmethod
    def loss(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The sum of the losses of a micro-batch's targets, on its inputs."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Metrics, the goal among them; empty without data to evaluate on. All ranks call it."""

    def sample(self) -> str | None:
        """A text that the model writes as it is now; None of one that writes none.

        All ranks call it. Raises Interrupted when asked to stop.
        """
        return None

    def weights(self) -> dict[str, Any]:
        """The content of a weights file, adapters merged, on rank 0. All ranks call it."""
        llama, options = self.llama, self.session.options
        if options.option == "finetune" and options.lora_rank:
            llama = copy.deepcopy(llama)
            merge_lora(llama)
        state = full_state_dict(llama, self.session.ranks)
        return model_payload(llama, getattr(torch, options.save_dtype), state=state)

    @abstractmethod
    def locate(self, number: int) -> str:
        """Where sequence `number` of the data set is, for messages."""
