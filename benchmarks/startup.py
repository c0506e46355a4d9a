"""How long a user waits before anything happens; prints the median seconds of each command.

    python benchmarks/startup.py
    python benchmarks/startup.py --rounds 20

`--help` and a wrong flag are answered before torch is imported; what `import torch` alone takes is
measured beside them, for it is in every command that computes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {  # words after `python`, and the exit status that is right
    "run_llama.py --help": (["run_llama.py", "--help"], 0),
    "run_llama.py, a wrong flag": (["run_llama.py", "--no_such_flag"], 2),
    "check_model_precision.py --help": (["check_model_precision.py", "--help"], 0),
    "tokenizer.py --help": (["tokenizer.py", "--help"], 0),
    "python alone": (["-c", ""], 0),
    "python with torch": (["-c", "import torch"], 0),
}


def seconds_of(words: list[str], status: int) -> float:
    """Wall-clock time of one start; a wrong exit status ends the measurement."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != status:
        sys.exit(f"{' '.join(words)}: exit status {done.returncode}\n{done.stderr.decode()}")
    return seconds


def startup_seconds(rounds: int) -> dict[str, float]:
    """Median seconds of each command, which take turns; a first round warms the disk's cache."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(rounds + 1):
        for name, (words, status) in COMMANDS.items():
            seconds = seconds_of(words, status)
            if number:
                taken[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    print("| command | seconds |\n|---|---:|")
    for name, seconds in startup_seconds(parser.parse_args().rounds).items():
        print(f"| {name} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
