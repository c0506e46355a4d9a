"""A training step, ours and other programs', on random tokens: what compare.py measures of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from programs import (
    GPU_SHAPES,
    SHAPES,
    hugging_face_model,
    llama2c_model,
    nanogpt_model,
    our_config,
    our_model,
)

# Each program as it comes, with glibc's best settings for its large tensors, which a user has to
# know of, and compiled as well. Ours makes these settings itself.
WAYS = {"ours": ("as it comes", "compiled")}
PEERS_WAYS = ("as it comes", "tuned", "tuned and compiled")


def our_step(job: dict[str, Any], tokens: Any, targets: Any) -> tuple[Any, Any, Callable]:
    """Parameters, optimizer and loss as run_llama.py makes them."""
    import torch

    from llama import NextTokenLoss
    from minllama.machine.device import keep_memory_low
    from optimizer import make_optimizer

    keep_memory_low()
    model = our_model(job["shape"]).to(tokens.device)
    optimizer = make_optimizer(model, name="adamw", lr=1e-3, weight_decay=0.1)
    next_token_loss = NextTokenLoss(model)
    if job["compiled"]:
        next_token_loss = torch.compile(next_token_loss, dynamic=False)
    count = targets.numel()
    return model.parameters(), optimizer, lambda: next_token_loss(tokens, targets)[0] / count


def peers_step(job: dict[str, Any], tokens: Any, targets: Any) -> tuple[Any, Any, Callable]:
    """The same of another program, with torch's AdamW."""
    import torch

    if job["who"] == "transformers":
        model = hugging_face_model(job["shape"]).train()
    elif job["who"] == "nanoGPT":
        model = nanogpt_model(job["shape"], Path(job["nanogpt"]))
    else:
        model = llama2c_model(job["shape"], Path(job["llama2c"]))
    model.to(tokens.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=tokens.is_cuda or None)
    called = torch.compile(model, dynamic=False) if job["compiled"] else model

    def loss() -> torch.Tensor:
        if job["who"] == "transformers":
            return called(input_ids=tokens, labels=tokens).loss
        found = called(tokens, targets)
        return found[1] if job["who"] == "nanoGPT" else model.last_loss

    return model.parameters(), optimizer, loss


def train(job: dict[str, Any]) -> dict[str, float]:
    """Median tokens per second of forward, backward and optimizer step in bfloat16 autocast.

    Also the share of the device's rate of large bfloat16 products that its arithmetic reaches, and
    on a GPU the peak of its memory in MB.
    """
    import torch

    from minllama.machine.device import used_memory
    from minllama.machine.gpus import peak_flops

    device, shape = torch.device(job.get("device", "cpu")), (SHAPES | GPU_SHAPES)[job["shape"]]
    size = (shape.batch, shape.length + 1)
    tokens = torch.randint(0, shape.vocabulary, size, device=device)
    make = our_step if job["who"] == "ours" else peers_step
    parameters, optimizer, loss = make(job, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    parameters, seconds = list(parameters), []
    for _ in range(job["steps"] + 2):  # the first two compile, and fill the optimizer's state
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    rate = shape.batch * shape.length / statistics.median(seconds[2:])
    flops = our_config(job["shape"]).flops_per_token(shape.length, logits=True)
    figures = {"rate": rate, "share": rate * flops / peak_flops(device, torch.bfloat16)}
    return figures | ({"memory": used_memory(device) / 1e6} if device.type == "cuda" else {})


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
                if f"ours, {ours}" in figures
                for pairs in [zip(figures[f"ours, {ours}"], rounds, strict=True)]
            )
        yield f"| {shape} | {name} | {rate:,.0f} | {share:.0%} | {memory:,.0f} | {ratios} |"
