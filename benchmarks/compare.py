"""Our training step and decoding beside other programs', in turn, in one run; prints ratios.

    pip install transformers
    python benchmarks/compare.py
    python benchmarks/compare.py --shapes S T --rounds 5 --llama2c ../llama2.c

Every figure comes from a process of its own, so that no program inherits another's memory. The
programs take turns, round after round; a ratio is taken within a round, and its median printed.
`tuned` gives a peer glibc's best settings for its large tensors, which a user has to know of.
Compiling a program takes a minute; the compiler's own cache makes later rounds shorter.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from typing import Any

from decoding import decoded_tokens_per_second
from programs import SHAPES
from training import train, training_jobs, training_rows

TUNED = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "THP_MEM_ALLOC_ENABLE": "1",
}


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Do one job in this process; returns its figures and the process's peak memory in MB."""
    import resource

    if job["task"] == "train":
        figures = train(job)
    else:
        figures = {"rate": decoded_tokens_per_second(job["who"], job["shape"])}
    return figures | {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}


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


def take_turns(jobs: dict[str, dict[str, Any]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """The figures of every job, by name, a set of them for each round."""
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            figures[name].append(in_a_process(job))
    return figures


def compare(ours: dict[str, Any], peers: dict[str, dict[str, Any]], rounds: int) -> None:
    """Print a row per peer: median speeds, the median ratio, and the peak memories."""
    figures = take_turns({"ours": ours, **peers}, rounds)

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
    """A table of training steps: every program as it comes, tuned and compiled."""
    print("| shape | program | tokens/s | of bf16 products | peak MB | ours, compiled ours / it |")
    print("|---|---|---|---|---|---|")
    for shape in arguments.shapes:
        jobs = training_jobs(shape, steps=arguments.steps, llama2c=arguments.llama2c)
        for row in training_rows(shape, take_turns(jobs, arguments.rounds)):
            print(row, flush=True)
    print()


def compare_decoding(arguments: argparse.Namespace) -> None:
    """A table of decoding, each shape beside transformers."""
    print("| task, shape | peer | ours, tokens/s | peer, tokens/s | ratio | peak MB, ours / peer |")
    print("|---|---|---|---|---|---|")
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
    for what in [arguments.only] if arguments.only else COMPARISONS:
        COMPARISONS[what](arguments)


if __name__ == "__main__":
    main()
