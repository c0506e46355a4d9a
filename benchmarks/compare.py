"""Our training step and decoding beside other programs', in turn, in one run; prints ratios.

    pip install transformers
    python benchmarks/compare.py
    python benchmarks/compare.py --shapes S T --rounds 5 --llama2c ../llama2.c

Every figure comes from a process of its own, so that no program inherits another's memory. The
programs take turns, round after round; a ratio is taken within a round, and its median printed.
`tuned` gives a peer glibc's best settings for its large tensors, which a user has to know of.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from decoding import decoded_tokens_per_second
from programs import SHAPES, hugging_face_model, llama2c_model, our_model

TUNED = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "THP_MEM_ALLOC_ENABLE": "1",
}


# ---------------------------------------------------------------------------- training


def training_tokens_per_second(
    who: str, shape: str, dtype: str, steps: int, checkout: str
) -> float:
    """Median speed of forward, backward and optimizer step on random tokens."""
    import torch

    _, _, _, vocabulary, length, batch = SHAPES[shape]
    tokens = torch.randint(0, vocabulary, (batch, length + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if who == "ours":
        from optimizer import AdamW

        model = our_model(shape)
        optimizer = AdamW(model.parameters())

        def loss() -> torch.Tensor:
            loss_sum, count = model.loss(inputs, targets)
            return loss_sum / count
    elif who == "transformers":
        model = hugging_face_model(shape).train()
        optimizer = torch.optim.AdamW(model.parameters())

        def loss() -> torch.Tensor:
            return model(input_ids=inputs, labels=inputs).loss
    else:
        model = llama2c_model(shape, Path(checkout))
        optimizer = torch.optim.AdamW(model.parameters())

        def loss() -> torch.Tensor:
            model(inputs, targets)
            return model.last_loss

    seconds = []
    for _ in range(steps + 1):  # the first is not counted
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return batch * length / statistics.median(seconds[1:])


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Do one job in this process; returns its speed and the process's peak memory in MB."""
    import resource

    if job["task"] == "train":
        rate = training_tokens_per_second(
            job["who"], job["shape"], job["dtype"], job["steps"], job["llama2c"]
        )
    else:
        rate = decoded_tokens_per_second(job["who"], job["shape"])
    return {"rate": rate, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}


# ---------------------------------------------------------------------------- taking turns


def in_a_process(job: dict[str, Any]) -> dict[str, float]:
    """Run `measure` in a fresh process."""
    environment = os.environ | (TUNED if job.get("tuned") else {})
    done = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps(job)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{job}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(ours: dict[str, Any], peers: dict[str, dict[str, Any]], rounds: int) -> None:
    """Print a row per peer: median speeds, the median ratio, and the peak memories."""
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in ("ours", *peers)}
    for _ in range(rounds):
        for name, job in {"ours": ours, **peers}.items():
            figures[name].append(in_a_process(job))

    def median(name: str, key: str) -> float:
        return statistics.median(figure[key] for figure in figures[name])

    for name in peers:
        pairs = zip(figures["ours"], figures[name], strict=True)
        ratio = statistics.median(a["rate"] / b["rate"] for a, b in pairs)
        print(
            f"| {ours['task']} {ours['shape']} | {name} | {median('ours', 'rate'):,.0f} "
            f"| {median(name, 'rate'):,.0f} | {ratio:.2f} "
            f"| {median('ours', 'memory'):,.0f} / {median(name, 'memory'):,.0f} |",
            flush=True,
        )


def compare_training(arguments: argparse.Namespace) -> None:
    """A table of training steps, each shape beside every peer."""
    peers = ["transformers", *(["llama2.c"] if arguments.llama2c else [])]
    for shape in arguments.shapes:
        job = {
            "task": "train", "shape": shape, "steps": arguments.steps, "dtype": "bfloat16",
            "llama2c": arguments.llama2c,
        }  # fmt: skip
        rivals = {
            f"{peer}, {how}": job | {"who": peer, "tuned": how == "tuned"}
            for peer in peers
            for how in ("as it comes", "tuned")
        }
        compare(job | {"who": "ours"}, rivals, arguments.rounds)


def compare_decoding(arguments: argparse.Namespace) -> None:
    """A table of decoding, each shape beside transformers."""
    for shape in arguments.shapes:
        job = {"task": "decode", "shape": shape}
        compare(
            job | {"who": "ours"},
            {"transformers, with its cache": job | {"who": "transformers"}},
            arguments.rounds,
        )


COMPARISONS = {"training": compare_training, "decoding": compare_decoding}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=COMPARISONS, help="unset: everything")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="training steps of a round")
    parser.add_argument("--llama2c", default="", help="a checkout of llama2.c, to measure it too")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(measure(json.loads(arguments.job))))
        return
    if importlib.util.find_spec("transformers") is None:
        sys.exit("compare.py: transformers is missing: pip install transformers")
    print("| task, shape | peer | ours, tokens/s | peer, tokens/s | ratio | peak MB, ours / peer |")
    print("|---|---|---|---|---|---|")
    for what in [arguments.only] if arguments.only else COMPARISONS:
        COMPARISONS[what](arguments)


if __name__ == "__main__":
    main()
