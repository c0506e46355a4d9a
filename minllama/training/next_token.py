"""Next-token prediction as a task: on chunks of text, or on the answers of dialogues.

What pretraining and chat share; how sequences are ordered is their own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llama import Llama, NextTokenLoss
from minllama.cli.console import progress_bar
from minllama.inference.evaluation import TextScore
from minllama.machine.device import autocast
from minllama.machine.sharding import no_gradients
from minllama.training.session import Session
from minllama.training.task import Batch, Task
from utils import ChatDataset, PretrainDataset

TokenDataset = PretrainDataset | ChatDataset  # batch(indices) gives tokens and targets


class NextTokenTask(Task):
    """Next-token prediction on a data set, chosen by the loss on a held-out one if there is one."""

    def __init__(
        self,
        session: Session,
        model: Llama,
        train_set: TokenDataset,
        val_set: TokenDataset | None,
        *,
        dynamic: bool,
        bos_id: int | None = None,
    ) -> None:
        """`bos_id`, where given, begins documents that see nothing of those before them."""
        self.train_set, self.val_set = train_set, val_set
        self.next_token_loss = NextTokenLoss(model, bos_id)
        super().__init__(
            session, model, model, module=self.next_token_loss, dtype=session.dtype, dynamic=dynamic
        )
        self.goal = "loss" if val_set is None else "val_loss"

    def batch(self, numbers: np.ndarray) -> Batch:
        return Batch(self.train_set.batch(numbers))

    def count(self, numbers: np.ndarray) -> tuple[int, int]:
        targets = self.train_set.count_targets(numbers)
        return targets, targets

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.compiled(tokens, targets)[0]

    def evaluate(self) -> dict[str, float]:
        if self.val_set is None:
            return {}
        return evaluate_tokens(self.next_token_loss, self.val_set, self.session)


def evaluate_tokens(
    next_token_loss: NextTokenLoss, dataset: TokenDataset, session: Session
) -> dict[str, float]:
    """Loss in nats per token, perplexity and bits per byte over all of `dataset`.

    Every rank must call this. The ranks share the batches and add up their losses in the batches'
    order, so the sum does not depend on how many they are. Raises Interrupted when asked to stop.
    """
    ranks, device, size = session.ranks, session.device, session.options.micro_batch_size
    sums = np.zeros((2, -(-len(dataset) // size)))  # each batch's loss and targets
    losses: list[Tensor] = []  # on the device, for which nothing waits until the end
    next_token_loss.eval()
    with no_gradients(next_token_loss), autocast(device, session.dtype):
        numbers = list(ranks.split_evenly(sums.shape[1]))
        for number, counts in progress_bar(numbers, desc="validating", leave=False, disable=None):
            ranks.check_stop(session.stop)
            indices = range(number * size, min((number + 1) * size, len(dataset)))
            batch = Batch(dataset.batch(indices)).to(device)
            losses.append(next_token_loss(*batch.inputs)[0])
            sums[1, number] = counts * dataset.count_targets(indices)
    next_token_loss.train()
    for (number, counts), loss in zip(numbers, torch.stack(losses).tolist(), strict=True):
        sums[0, number] = loss if counts else 0
    loss_sum, targets = (sum(row) for row in ranks.sum_array(sums).tolist())
    return TextScore(loss_sum, targets, dataset.utf8_bytes or 0).metrics()
