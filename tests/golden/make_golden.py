"""Make the golden checkpoints of a format version: `python tests/golden/make_golden.py 2`.

Files of versions that were once written are never made again: what loads here is what a user has
on the disk. Version 1 was written with its content's digest among the keys, version 2 is sealed.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))
sys.path.insert(0, str(FOLDER.parent))

import numpy as np
import torch
from survivor import tiny_model

from llama import FORMAT_VERSION, content_digest, model_payload
from optimizer import AdamW, parameter_groups
from utils import load_checkpoint, random_state, save_checkpoint, seed_everything


def weights() -> dict[str, Any]:
    """A weights file."""
    return model_payload(tiny_model())


def checkpoint(version: int) -> dict[str, Any]:
    """A resumable checkpoint after one step."""
    seed_everything(7)
    model = tiny_model()
    optimizer = AdamW(parameter_groups(model, 0.1), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    progress = {
        "step": 1, "tokens": 8, "skipped": 0, "first": 2.75, "best": 2.5, "best_step": 1,
        "pending": None,
    }  # fmt: skip
    if version > 1:
        progress |= {"lr_scale": 0.5, "split": 2}
    return {
        **model_payload(model),
        "optimizer": optimizer.state_dict(),
        "scaler": {},
        "rng": random_state() | {"cuda": []},
        "progress": progress,
        "identity": {"--seed": 7},
        "options": {"option": "pretrain"},
        **({"run_id": "golden"} if version > 1 else {}),
    }


def save_version_1(path: Path, payload: dict[str, Any]) -> None:
    """As the first version of this program wrote."""
    payload = payload | {"format_version": 1}
    torch.save(payload | {"digest": content_digest(payload)}, path)


def facts(path: Path) -> dict[str, Any]:
    """What the file must hold for ever."""
    payload = load_checkpoint(path)
    found: dict[str, Any] = {"content": content_digest(payload)}
    if "rng" in payload:
        found["next"] = next_random(payload["rng"])
    return found


def next_random(state: dict[str, Any]) -> list[float]:
    """The first number of each generator after its state is put back."""
    from utils import restore_random_state

    restore_random_state(state)
    return [random.random(), float(np.random.rand()), float(torch.rand(1))]


def main(version: int) -> None:
    """Write the two files of a version and add what they hold to expected.json."""
    save = {1: save_version_1, FORMAT_VERSION: save_checkpoint}[version]
    expected_path = FOLDER / "expected.json"
    expected = json.loads(expected_path.read_text("utf-8")) if expected_path.is_file() else {}
    for name, payload in (("weights", weights()), ("checkpoint", checkpoint(version))):
        path = FOLDER / f"{name}-v{version}.pt"
        save(path, payload)
        expected[path.name] = facts(path)
        print(f"wrote {path}: {path.stat().st_size:,} bytes")
    text = json.dumps(dict(sorted(expected.items())), indent=2) + "\n"
    expected_path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]))
