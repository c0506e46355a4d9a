"""run_llama.py with a fault on rank 1, for torchrun: FAULT, then the words of the command line.

nan: no loss of ten steps in a row is finite on this rank. memory: it runs out of memory in step 3.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import run_llama
from config import parse_options
from llama import Llama
from utils import exit_at_once

FAULT, *WORDS = sys.argv[1:]
BAD_STEPS = range(6, 16)
step, real_loss, real_step = 0, Llama.loss, run_llama.optimizer_step


def optimizer_step(run: run_llama.Run) -> dict:
    """Count the steps, also those that are made again."""
    global step
    step += 1
    return real_step(run)


def loss(self: Llama, tokens: torch.Tensor, targets: torch.Tensor) -> tuple:
    """The loss, or the fault."""
    if FAULT == "memory" and step == 3:
        raise torch.OutOfMemoryError("CUDA out of memory")
    loss_sum, count = real_loss(self, tokens, targets)
    return (loss_sum * float("nan") if step in BAD_STEPS and FAULT == "nan" else loss_sum), count


run_llama.optimizer_step = optimizer_step
if os.environ["RANK"] == "1":
    Llama.loss = loss
exit_at_once(run_llama.main(parse_options(WORDS)))
