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
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from decoding import (
    C_PROGRAMS,
    decoding_groups,
    decoding_rows,
    measure_decoding,
    perplexity_cost,
    prepare_c_programs,
)
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
    elif job["task"] == "decode":
        figures = measure_decoding(job)
    else:
        prepare_c_programs(Path(job["llama2c"]), Path(job["folder"]), job["shapes"])
        return {}
    in_child = job["who"] in C_PROGRAMS
    usage = resource.getrusage(resource.RUSAGE_CHILDREN if in_child else resource.RUSAGE_SELF)
    return {"memory": usage.ru_maxrss / 1000} | figures


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
    """A table of decoding, and what weights of fewer bytes cost."""
    print("| task | program | tokens/s | ratios | compiling, s | peak MB |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # what is compiled is kept for the rounds
        if arguments.llama2c:  # not in here: a child's peak memory begins at its parent's
            in_a_process({"task": "prepare", "folder": folder, **vars(arguments)})
        for shape in arguments.shapes:
            groups = decoding_groups(shape, llama2c=arguments.llama2c, folder=folder)
            for group, jobs in groups.items():
                for row in decoding_rows(f"{group}, {shape}", take_turns(jobs, arguments.rounds)):
                    print(row, flush=True)
    costs = ", ".join(f"{name} {cost:+.4f} %" for name, cost in perplexity_cost().items())
    print(f"perplexity of the shipped model on the held-out stories: {costs}\n")


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
