"""Resumable checkpoints: what is in one, and reading it, from one file or from each rank's shards.

A checkpoint holds everything of a run that is not a flag or a data file: weights, optimizer, random
state, progress. Of a model sharded over several ranks it is a folder: `state.pt` with the plain
values and the SHA-256 of every other file, written last, and a file of shards from each rank. Any
number of ranks reads either kind.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minllama.formats.pt_file import STATE_FILE, load_pt, state_file
from minllama.system.errors import UsageError
from minllama.system.files import remove

RESUMABLE = ("model", "optimizer", "scaler", "rng", "progress", "identity")  # each a dict


class Summary(NamedTuple):
    """What a checkpoint says of itself, unverified."""

    run_id: str
    step: int
    skipped: int  # updates that were skipped in a row, up to this step
    complete: bool  # the step's record was evaluated and written


def load_checkpoint(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """A run's state, its tensors mapped from the disk; runs no code.

    Of a sharded checkpoint every tensor is the list of its shards, which `sharding.join_shards`
    joins. Raises UsageError naming the file that is missing, damaged or holds no such state.
    """
    payload = _load_plain(path, verify=verify)
    if not path.is_dir():
        return payload
    shards = [
        load_pt(path / name, verify=verify, digest=digest)
        for name, digest in _listed_shards(path, payload).items()
    ]
    try:
        return payload | {key: _lists(*(s[key] for s in shards)) for key in ("model", "optimizer")}
    except (KeyError, TypeError, AttributeError):
        raise UsageError(f"{path}: its shards do not belong together") from None


def summarize(path: Path) -> Summary:
    """Read a checkpoint's plain values and none of its tensors. Raises UsageError."""
    payload = _load_plain(path, verify=False)
    progress, run_id = payload["progress"], payload.get("run_id")
    step, skipped = progress.get("step"), progress.get("skipped", 0)
    if not isinstance(step, int) or not isinstance(skipped, int) or not isinstance(run_id, str):
        raise UsageError(f"{path} is damaged: its step is {str(step)[:20]!r}")
    return Summary(run_id, step, skipped, progress.get("pending") is None)


def remove_unnamed(folder: Path) -> None:
    """Delete the shards that the checkpoint in a folder does not name; all, where there is none.

    So one of the same step stays whole until another takes its place. Best effort.
    """
    with contextlib.suppress(OSError, UsageError):
        if not (folder / STATE_FILE).exists():
            remove(folder)
            return
        named = _listed_shards(folder, _load_plain(folder, verify=False))
        for path in [*folder.glob("shard-*"), *folder.glob(".*.tmp")]:
            if path.name not in named:
                with contextlib.suppress(OSError):
                    remove(path)


def _load_plain(path: Path, *, verify: bool) -> dict[str, Any]:
    """The content of `state_file(path)`; raises UsageError where that is no state of a run."""
    payload = load_pt(state_file(path), verify=verify)
    missing = sorted(set(RESUMABLE) - payload.keys())
    if missing or not all(isinstance(payload[name], dict) for name in RESUMABLE):
        raise UsageError(
            f"{path} is a weights file and holds no state to resume "
            f"({', '.join(missing) or 'other types'}): name a -epoch-N.pt or -step-N.pt file"
        )
    return payload


def _listed_shards(folder: Path, payload: dict[str, Any]) -> dict[str, str]:
    """The SHA-256 of each file of shards by its name, which leads out of no folder."""
    shards = payload.get("shards")
    if not isinstance(shards, dict) or not shards:
        raise UsageError(f"{folder / STATE_FILE}: lists no shards, so it is no sharded checkpoint")
    for name, digest in shards.items():
        if not (isinstance(name, str) and isinstance(digest, str) and Path(name).name == name):
            raise UsageError(f"{folder / STATE_FILE}: {name!r} is not the name of a shard's file")
    return shards


def _lists(*nodes: Any) -> Any:
    """Nested dicts of the ranks as one, with a list of shards for each tensor."""
    first = nodes[0]
    if torch.is_tensor(first):
        return list(nodes)
    if isinstance(first, dict):
        return {key: _lists(*(node[key] for node in nodes)) for key in first}
    return first
