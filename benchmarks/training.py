"""A training step, ours and other programs', on random tokens: what compare.py measures of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from programs import SHAPES, hugging_face_model, llama2c_model, our_model

# Each program as it comes, with glibc's best settings for its large tensors, which a user has to
# know of, and compiled as well. Ours makes these settings itself.
WAYS = {"ours": ("as it comes", "compiled")}
PEERS_WAYS = ("as it comes", "tuned", "tuned and compiled")


def our_step(job: dict[str, Any], tokens: Any, targets: Any) -> tuple[Any, Any, Callable]:
    """Parameters, optimizer and loss as run_llama.py makes them."""
    import torch

    from llama import NextTokenLoss
    from minllama.device import keep_freed_memory
    from optimizer import make_optimizer

    keep_freed_memory()
    model = our_model(job["shape"])
    optimizer = make_optimizer(model, name="adamw", lr=1e-3, weight_decay=0.1)
    next_token_loss = NextTokenLoss(model)
    if job["compiled"]:
        next_token_loss = torch.compile(next_token_loss, dynamic=False)
    count = targets.numel()
    return model.parameters(), optimizer, lambda: next_token_loss(tokens, targets)[0] / count


def peers_step(job: dict[str, Any], tokens: Any, targets: Any) -> tuple[Any, Any, Callable]:
    """The same of transformers or llama2.c, with torch's AdamW."""
    import torch

    if job["who"] == "transformers":
        model = hugging_face_model(job["shape"]).train()
    else:
        model = llama2c_model(job["shape"], Path(job["llama2c"]))
    optimizer = torch.optim.AdamW(model.parameters())
    called = torch.compile(model, dynamic=False) if job["compiled"] else model

    def loss() -> torch.Tensor:
        if job["who"] == "transformers":
            return called(input_ids=tokens, labels=tokens).loss
        called(tokens, targets)
        return model.last_loss

    return model.parameters(), optimizer, loss


def train(job: dict[str, Any]) -> dict[str, float]:
    """Median tokens per second of forward, backward and optimizer step in bfloat16 autocast.

    Also the share of the rate of a large bfloat16 product, measured here, that its arithmetic
    reaches.
    """
    import torch

    from minllama.gpus import peak_flops

    _, _, _, vocabulary, length, batch = SHAPES[job["shape"]]
    tokens = torch.randint(0, vocabulary, (batch, length + 1))
    make = our_step if job["who"] == "ours" else peers_step
    parameters, optimizer, loss = make(job, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    parameters, seconds = list(parameters), []
    for _ in range(job["steps"] + 2):  # the first two compile, and fill the optimizer's state
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    rate = batch * length / statistics.median(seconds[2:])
    flops = our_model(job["shape"]).config.flops_per_token(length, logits=True)
    return {"rate": rate, "share": rate * flops / peak_flops(torch.device("cpu"), torch.bfloat16)}


def training_jobs(shape: str, *, steps: int, llama2c: str) -> dict[str, dict[str, Any]]:
    """Every program in every way, by name."""
    jobs = {}
    for who in ("ours", "transformers", *(["llama2.c"] if llama2c else [])):
        for way in WAYS.get(who, PEERS_WAYS):
            jobs[f"{who}, {way}"] = {
                "task": "train",
                "who": who,
                "shape": shape,
                "steps": steps,
                "llama2c": llama2c,
                "tuned": "tuned" in way,
                "compiled": "compiled" in way,
            }
    return jobs


def training_rows(shape: str, figures: dict[str, list[dict[str, float]]]) -> Iterable[str]:
    """A table's row per program: medians, and of the rounds' ratios to ours eager and compiled."""
    for name, rounds in figures.items():
        rate, share, memory = (
            statistics.median(figure[key] for figure in rounds)
            for key in ("rate", "share", "memory")
        )
        ratios = ""
        if not name.startswith("ours"):
            ratios = " / ".join(
                f"{statistics.median(a['rate'] / b['rate'] for a, b in pairs):.2f}"
                for ours in WAYS["ours"]
                for pairs in [zip(figures[f"ours, {ours}"], rounds, strict=True)]
            )
        yield f"| {shape} | {name} | {rate:,.0f} | {share:.0%} | {memory:,.0f} | {ratios} |"
