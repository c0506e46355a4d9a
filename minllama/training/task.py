"""What is trained: a task's model, batches, loss and evaluation, as the train loop asks for them.

A task is a module beside this one: `pretraining`, `classification`, `chat_tuning`. Next-token
prediction, which two of them are, is here.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from config import IGNORE_INDEX, Options
from llama import Llama, NextTokenLoss, model_payload
from minllama.cli.console import progress_bar
from minllama.inference.evaluation import TextScore
from minllama.machine.device import autocast
from minllama.machine.random_state import random_state, restore_random_state
from minllama.machine.sharding import distribute, full_state_dict, no_gradients
from minllama.model.lora import merge_lora
from minllama.training.run import Run
from optimizer import layer_matrices
from utils import ChatDataset, PretrainDataset

TokenDataset = PretrainDataset | ChatDataset  # batch(indices) gives tokens and targets


@dataclass(frozen=True)
class Batch:
    """A micro-batch: the arguments of `loss`, a row for each sequence; targets or labels last."""

    # tokens (B, T), targets (B, T); of a classifier tokens (B, T), lengths (B,), labels (B,)
    inputs: tuple[Tensor, ...]

    def pinned(self) -> Batch:
        """A copy in memory that a GPU reads by itself."""
        return Batch(tuple(tensor.pin_memory() for tensor in self.inputs))

    def to(self, device: torch.device) -> Batch:
        """A copy on the device, to a GPU without waiting."""
        if device.type != "cuda":
            return Batch(tuple(tensor.to(device) for tensor in self.inputs))
        pinned = self.pinned()
        return Batch(tuple(tensor.to(device, non_blocking=True) for tensor in pinned.inputs))

    def parts(self, count: int) -> list[tuple[Tensor, ...]]:
        """The inputs in `count` parts of about as many rows, fewer where there are fewer rows."""
        rows = -(-len(self.inputs[0]) // count)
        return list(zip(*(tensor.split(rows) for tensor in self.inputs), strict=True))

    def without_targets(self) -> Batch:
        """Its first row with nothing to predict, for a rank that only joins in the collectives."""
        *inputs, targets = (tensor[:1] for tensor in self.inputs)
        return Batch((*inputs, torch.full_like(targets, IGNORE_INDEX)))


@dataclass(frozen=True)
class StepBatch:
    """What one optimizer step trains on: the sequences of all ranks, and this rank's batches."""

    indices: np.ndarray  # of the sequences of all ranks in the data set
    target_count: int  # of all ranks, that the loss is the mean over
    token_count: int  # read by all ranks
    micro_batches: list[Batch]  # this rank's, in the CPU's memory


class Task(ABC):
    """What the tasks do not share: data, model, batches, loss, evaluation, and how a run ends.

    Made before the plan, with the data loaded; `build` then puts the model on the device.
    """

    identity: dict[str, Any]  # what a resumed run must share with its first one, by flags
    sizes: dict[str, Any]  # of model and data, for the TrainingPlan
    goal: str  # the metric that chooses the best model
    held_out: str | None  # names the data that it is measured on, if there are any
    data: dict[str, str | None]  # for the record: text, held_out and vocabulary, by what they are
    higher_is_better: bool = False
    best_interval: int = 1  # epochs between choices of a best model; 0: epochs are not evaluated
    eval_interval: int = 0  # optimizer steps between evaluations; 0: at the ends of epochs only
    split: int = 1  # parts in which the train loop passes a micro-batch to `loss`

    run: Run
    llama: Llama  # its shape travels with every file
    model: nn.Module  # what is trained: the Llama, or what is around it

    @abstractmethod
    def build(self) -> None:
        """Distribute the model over devices and ranks. Every rank must call this."""

    def describe_start(self) -> str | None:
        """What to say before the first step, if anything."""
        return None

    def set_model(
        self, model: nn.Module, module: nn.Module, *, dtype: torch.dtype, dynamic: bool
    ) -> None:
        """Distribute `model`, which has the trained parameters, and compile it if that was asked.

        `module` is what `loss` calls: the model itself or a wrapper around it. `dtype` is that of
        FSDP's gathered weights; `dynamic`: compile for sequences of any length.
        """
        options = self.run.options
        self.model = model
        self.llama.activation_checkpointing = options.activation_checkpointing
        self.parallel = distribute(
            module,
            self.llama.materialized_layers(),
            ranks=self.run.ranks,
            parallel=options.parallel,
            device=self.run.device,
            dtype=dtype,
        )
        self.uses_rng = any(isinstance(part, nn.Dropout) and part.p > 0 for part in model.modules())
        self.compiled = self.parallel
        if options.compile == "on":
            self.compiled = torch.compile(self.parallel, dynamic=dynamic)

    def step_batch(self, step: int) -> StepBatch:
        """What optimizer step `step` trains on, by its number alone; any thread may make it.

        All ranks have equally many micro-batches: one with one fewer gets one without targets, and
        takes part in every pass. Raises TextLost.
        """
        run = self.run
        indices = self.sequences(*divmod(step, run.plan.steps_per_epoch))
        size = run.options.micro_batch_size
        parts = np.split(indices, range(size, len(indices), size))
        batches = [
            self.batch(parts[part]) if is_own else self.batch(parts[part][:1]).without_targets()
            for part, is_own in run.ranks.split_evenly(len(parts))
        ]
        if run.device.type == "cuda":
            with torch.cuda.device(run.device):  # another thread's is the first GPU
                batches = [batch.pinned() for batch in batches]
        return StepBatch(indices, *self.count(indices), batches)

    def warm_up(self) -> None:
        """Pass once through several ranks' reduction of gradients, training nothing.

        After its first pass DDP rebuilds its buckets, and the order in which floating-point numbers
        are added up depends on their place in a bucket. Done before the first step of every start,
        all steps add in the same order, and a resumed run is bit-identical to an uninterrupted one.
        """
        run = self.run
        if run.ranks.world_size == 1:
            return
        random_before = random_state()
        batch = self.step_batch(run.progress.step).micro_batches[0].without_targets().to(run.device)
        with autocast(run.device, run.dtype):
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
    def loss(self, *inputs: Tensor) -> Tensor:
        """The sum of the losses of a micro-batch's targets, (), on its inputs."""

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """Metrics, the goal among them; empty without data. Every rank must call this."""

    def sample(self) -> str | None:
        """A text that the model writes as it is now; None of one that writes none.

        Every rank must call this. Raises Interrupted when asked to stop.
        """
        return None

    def weights(self) -> dict[str, Any]:
        """The content of a weights file, adapters merged, on rank 0. Every rank must call this."""
        llama, options = self.llama, self.run.options
        if options.option == "finetune" and options.lora_rank:
            llama = copy.deepcopy(llama)
            merge_lora(llama)
        state = full_state_dict(llama, self.run.ranks)
        return model_payload(llama, getattr(torch, options.save_dtype), state=state)

    @abstractmethod
    def locate(self, number: int) -> str:
        """Where sequence `number` of the data set is, for messages."""

    @abstractmethod
    def finish(self) -> None:
        """Write the results of a run that came to its end, and say what there is.

        Every rank must call this. Raises Interrupted when asked to stop.
        """


def trained_sizes(model: nn.Module, options: Options) -> dict[str, int]:
    """What the plan has to know of which of a loaded model's parameters are trained, and how."""
    muon = layer_matrices(model) if options.optimizer == "muon" else []
    return {
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "muon_parameters": sum(p.numel() for p in muon),
    }


# ---------------------------------------------------------------------------- next tokens


class NextTokenTask(Task):
    """Next-token prediction on a data set, chosen by the loss on a held-out one if there is one."""

    train_set: TokenDataset
    val_set: TokenDataset | None

    def set_llama(self, *, dynamic: bool, bos_id: int | None = None) -> None:
        """Train the Llama; `bos_id`, where given, begins documents that see none before them."""
        self.next_token_loss = NextTokenLoss(self.llama, bos_id)
        dtype = self.run.dtype
        self.set_model(self.llama, self.next_token_loss, dtype=dtype, dynamic=dynamic)
        self.goal = "loss" if self.val_set is None else "val_loss"

    def batch(self, numbers: np.ndarray) -> Batch:
        return Batch(self.train_set.batch(numbers))

    def count(self, numbers: np.ndarray) -> tuple[int, int]:
        targets = self.train_set.count_targets(numbers)
        return targets, targets

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.compiled(tokens, targets)[0]

    def evaluate(self) -> dict[str, Any]:
        if self.val_set is None:
            return {}
        return evaluate_tokens(self.next_token_loss, self.val_set, self.run)


def evaluate_tokens(
    next_token_loss: NextTokenLoss, dataset: TokenDataset, run: Run
) -> dict[str, Any]:
    """Loss in nats per token, perplexity and bits per byte over all of `dataset`.

    Of a text of several sources that is the mean over the tokens of all of them together, and the
    loss and bits per byte of each come with it. Every rank must call this. Raises Interrupted when
    asked to stop.
    """
    if isinstance(dataset, ChatDataset) or len(dataset.sources) == 1:
        return score_tokens(next_token_loss, dataset, run).metrics()
    scores = {
        name: score_tokens(next_token_loss, part, run) for name, part in dataset.by_source.items()
    }
    total = TextScore(*map(sum, zip(*map(astuple, scores.values()), strict=True)))
    losses = {name: score.loss for name, score in scores.items()}
    bits = {name: score.bits_per_byte for name, score in scores.items()}
    return total.metrics() | {"val_loss_by_source": losses, "bits_per_byte_by_source": bits}


def score_tokens(next_token_loss: NextTokenLoss, dataset: TokenDataset, run: Run) -> TextScore:
    """How well the model predicts all of `dataset`.

    The ranks share the batches and add up their losses in the batches' order, so the sum does not
    depend on how many they are.
    """
    ranks, size = run.ranks, run.options.micro_batch_size
    sums = np.zeros((2, -(-len(dataset) // size)))  # (2, batches): summed loss, target count
    losses: list[Tensor] = []  # on the device, for which nothing waits until the end
    next_token_loss.eval()
    with no_gradients(next_token_loss), autocast(run.device, run.dtype):
        numbers = list(ranks.split_evenly(sums.shape[1]))
        for number, is_own in progress_bar(numbers, desc="validating", leave=False, disable=None):
            ranks.check_stop(run.stop)
            indices = range(number * size, min((number + 1) * size, len(dataset)))
            batch = Batch(dataset.batch(indices)).to(run.device)
            losses.append(next_token_loss(*batch.inputs)[0])
            sums[1, number] = is_own * dataset.count_targets(indices)
    next_token_loss.train()
    for (number, is_own), loss in zip(numbers, torch.stack(losses).tolist(), strict=True):
        sums[0, number] = loss if is_own else 0
    loss_sum, targets = (sum(row) for row in ranks.sum_array(sums).tolist())
    return TextScore(loss_sum, targets, dataset.utf8_bytes or 0)
