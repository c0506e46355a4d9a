"""How much a run survives: kills, crashes, failing disks, damage, attacks, signals, counted.

    python benchmarks/survival.py                 # the full table, fourteen minutes
    python benchmarks/survival.py --kills 20 --damages 300 --crash_every 10 --lines 50 --texts 90

Prints a Markdown table of what was tried and survived; exit status 1 if anything was lost. Needs
nothing but the program itself.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import attacker
import hostile_texts
import survivor
import torch

WHAT = {
    "kills": "the run, resumed each time, ends bit-equal to one never killed",
    "crashes": "ended at a write, fsync, rename or deletion: what is there is whole, old or new",
    "faults": "the old file stays, the run continues, the save is tried again",
    "damages": "detected, not loaded",
    "command lines": "ends in lines that say why, with the right status, and no traceback",
    "hostile files": "nothing runs, memory stays bounded, no crash, no traceback",
    "hostile texts": "an end within seconds and why, nothing forged, nothing of the user's lost",
    "signals": "in six phases: exit status and saved step are right",
}


def table(results: dict[str, survivor.Tally]) -> str:
    """The counts as Markdown."""
    rows = ["| what happens | what must hold | tried | survived |", "|---|---|---:|---:|"]
    for group, tally in results.items():
        for kind, tried in sorted(tally.tried.items()):
            rows.append(f"| {kind} | {WHAT[group]} | {tried:,} | {tally.survived[kind]:,} |")
    tried = sum(tally.tried.total() for tally in results.values())
    survived = sum(tally.survived.total() for tally in results.values())
    rows.append(f"| **all** | | **{tried:,}** | **{survived:,}** |")
    return "\n".join(rows)


def main() -> int:
    """Try everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs (default: 200)")
    parser.add_argument("--damages", type=int, default=5000, help="flips and truncations")
    parser.add_argument("--lines", type=int, default=1000, help="random command lines")
    parser.add_argument("--files", type=int, default=576, help="hostile files")
    parser.add_argument("--texts", type=int, default=1350, help="hostile texts, names, answers")
    parser.add_argument("--crash_every", type=int, default=1, help="try every Nth crash point")
    parser.add_argument("--seed", type=int, default=0, help="of what is random")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tries = {
            "kills": lambda: survivor.kills(folder / "kills", args.kills, seed=args.seed),
            "crashes": lambda: survivor.crash_points(folder / "crashes", every=args.crash_every),
            "faults": lambda: survivor.faults(folder / "faults"),
            "damages": lambda: survivor.corruption(folder / "damages", args.damages, args.seed),
            "command lines": lambda: attacker.command_lines(
                folder / "lines", args.lines, args.seed
            ),
            "hostile files": lambda: attacker.hostile_files(
                folder / "files", args.files, args.seed
            ),
            "hostile texts": lambda: hostile_texts.hostile_texts(
                folder / "texts", args.texts, args.seed
            ),
            "signals": lambda: survivor.signals(folder / "signals"),
        }
        results = {}
        for group, attempt in tries.items():
            started = time.monotonic()
            with contextlib.redirect_stdout(io.StringIO()):
                results[group] = attempt()
            print(f"{group}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    print(table(results))
    failures = [failure for tally in results.values() for failure in tally.failures]
    print("\n".join(failures), end="\n" if failures else "", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
