"""Make the golden files of the format version of today: `python tests/golden/make_golden.py`.

Files of a version that was once written are never made again: what loads here is what a user has on
the disk.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
sys.path.insert(0, str(FOLDER.parents[1]))
sys.path.insert(0, str(FOLDER.parent))

import numpy as np
import torch
from survivor import content_digest, tiny_model

from llama import model_payload
from minllama.formats.pt_file import FORMAT_VERSION, load_pt, save_pt
from minllama.machine.random_state import random_state, restore_random_state, seed_everything
from optimizer import AdamW, parameter_groups


def weights() -> dict[str, Any]:
    """A weights file."""
    return model_payload(tiny_model())


def checkpoint() -> dict[str, Any]:
    """A resumable checkpoint after one step."""
    seed_everything(7)
    model = tiny_model()
    optimizer = AdamW(parameter_groups(model, 0.1), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    return {
        **model_payload(model),
        "optimizer": optimizer.state_dict(),
        "scaler": {},
        "rng": random_state() | {"cuda": []},
        "progress": {
            "step": 1, "tokens": 8, "skipped": 0, "first": 2.75, "best": 2.5, "best_step": 1,
            "pending": None, "lr_scale": 0.5, "split": 2,
        },
        "identity": {"--seed": 7},
        "options": {"option": "pretrain"},
        "run_id": "golden",
    }  # fmt: skip


def facts(path: Path) -> dict[str, Any]:
    """What the file must hold for ever."""
    payload = load_pt(path)
    found: dict[str, Any] = {"content": content_digest(payload)}
    if "rng" in payload:
        found["next"] = next_random(payload["rng"])
    return found


def next_random(state: dict[str, Any]) -> list[float]:
    """The first number of each generator after its state is put back."""
    restore_random_state(state)
    return [random.random(), float(np.random.rand()), float(torch.rand(1))]


def main() -> None:
    """Write the two files and add what they hold to expected.json."""
    for name, payload in (("weights", weights()), ("checkpoint", checkpoint())):
        path = FOLDER / f"{name}-v{FORMAT_VERSION}.pt"
        save_pt(path, payload)
        EXPECTED[path.name] = facts(path)
        print(f"wrote {path}: {path.stat().st_size:,} bytes")
    text = json.dumps(dict(sorted(EXPECTED.items())), indent=2) + "\n"
    (FOLDER / "expected.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
