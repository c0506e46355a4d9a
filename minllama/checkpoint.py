"""Resumable checkpoints: what is in one, and reading it, from one file or from each rank's shards.

A checkpoint holds everything of a run that is not a flag or a data file: weights, optimizer, random
state, progress. Of a model sharded over several ranks it is a folder: `state.pt` with the plain
values and the SHA-256 of every other file, written last, and a file of shards from each rank. Any
number of ranks reads either kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from minllama.errors import UsageError
from minllama.pt_file import load_pt, verify_seal

STATE_FILE = "state.pt"  # of a sharded checkpoint
RESUMABLE = ("model", "optimizer", "scaler", "rng", "progress", "identity")  # each a dict


class Summary(NamedTuple):
    """What a checkpoint says of itself, unverified."""

    run_id: str | None
    step: int
    skipped: int  # updates that were skipped in a row, up to this step
    complete: bool  # the step's record was evaluated and written


def state_file(path: Path) -> Path:
    """The file of a checkpoint that holds its plain values: itself, or one in its folder."""
    return path / STATE_FILE if path.is_dir() else path


def load_checkpoint(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """A run's state, its tensors mapped from the disk; runs no code.

    Of a sharded checkpoint every tensor is the list of its shards, which `sharding.join_shards`
    joins. Raises UsageError naming the file that is missing, damaged or holds no such state.
    """
    if not path.exists():
        raise UsageError(f"--resume {path}: no such file")
    payload = load_pt(state_file(path), verify=verify)
    check_resumable(path, payload)
    if not path.is_dir():
        return payload
    files = payload.get("shards")
    if not isinstance(files, dict) or not files:
        raise UsageError(f"{path / STATE_FILE}: lists no shards, so it is no sharded checkpoint")
    shards = [_load_shard(path, name, digest, verify) for name, digest in files.items()]
    try:
        return payload | {key: _lists(*(s[key] for s in shards)) for key in ("model", "optimizer")}
    except (KeyError, TypeError, AttributeError):
        raise UsageError(f"{path}: its shards do not belong together") from None


def _load_shard(folder: Path, name: Any, digest: Any, verify: bool) -> dict[str, Any]:
    if not isinstance(name, str) or Path(name).name != name:
        raise UsageError(f"{folder / STATE_FILE}: {name!r} is not the name of a shard's file")
    path = folder / name
    try:
        if verify and verify_seal(path) != digest:
            raise UsageError(f"{path} is damaged: its bytes do not match its SHA-256")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from None
    return load_pt(path, verify=False)


def _lists(*nodes: Any) -> Any:
    """Nested dicts of the ranks as one, with a list of shards for each tensor."""
    first = nodes[0]
    if torch.is_tensor(first):
        return list(nodes)
    if isinstance(first, dict):
        return {key: _lists(*(node[key] for node in nodes)) for key in first}
    return first


def check_resumable(path: Path, payload: dict[str, Any]) -> None:
    """Raise UsageError where a sound file is no state of a run."""
    missing = sorted(set(RESUMABLE) - payload.keys())
    if missing or not all(isinstance(payload[name], dict) for name in RESUMABLE):
        raise UsageError(
            f"{path} is a weights file and holds no state to resume "
            f"({', '.join(missing) or 'other types'}): name a -epoch-N.pt or -step-N.pt file"
        )


def summarize(path: Path) -> Summary:
    """Read a checkpoint's plain values and none of its tensors. Raises UsageError."""
    payload = load_pt(state_file(path), verify=False)
    check_resumable(path, payload)
    progress, run_id = payload["progress"], payload.get("run_id")
    step, skipped = progress.get("step"), progress.get("skipped", 0)
    if not isinstance(step, int) or not isinstance(skipped, int) or not isinstance(run_id, str):
        raise UsageError(f"{path} is damaged: its step is {str(step)[:20]!r}")
    return Summary(run_id, step, skipped, progress.get("pending") is None)
