"""Resumable checkpoints: in one file and in the shards of several ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import make_golden
from golden.make_golden import EXPECTED
from survivor import Malicious, content_digest, joined, refusal, small_payload, tiny_model

from minllama.formats.pt_file import save_pt
from minllama.machine.random_state import random_state, restore_random_state
from minllama.runs.checkpoints import (
    STATE_FILE,
    STATE_KEYS,
    Summary,
    load_checkpoint,
    state_file,
    summarize,
)
from minllama.system.errors import UsageError
from minllama.training.run import Progress
from optimizer import AdamW, parameter_groups

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_the_golden_checkpoint_loads_for_ever():
    """Content, optimizer, progress and random numbers of what a user has on the disk."""
    path = make_golden.FOLDER / "checkpoint-v2.pt"
    payload = load_checkpoint(path)
    assert content_digest(payload) == EXPECTED[path.name]["content"]
    before = random_state()
    try:
        assert make_golden.next_random(payload["rng"]) == EXPECTED[path.name]["next"]
    finally:
        restore_random_state(before)
    progress = Progress()
    progress.load(payload["progress"])
    assert (progress.step, progress.split, progress.lr_scale) == (1, 2, 0.5)
    optimizer = AdamW(parameter_groups(tiny_model(), 0.1), lr=1e-3)
    optimizer.load_state_dict(payload["optimizer"])
    assert all(state["step"] == 1 for state in optimizer.state.values())
    assert summarize(path) == Summary("golden", 1, skipped=0, complete=True)


def test_a_weights_file_is_no_state_of_a_run():
    """`--resume final-model.pt` ended in a KeyError."""
    path = Path("final-model.pt")
    save_pt(path, make_golden.weights())
    for load in (load_checkpoint, summarize):
        assert "final-model.pt is a weights file" in refusal(load, path)
    for name in STATE_KEYS:
        for content in (small_payload(1) | {name: 1}, small_payload(1)):
            if content[name] != 1:
                del content[name]
            save_pt(path, content)
            for load in (load_checkpoint, summarize):
                refusal(load, path)


@pytest.mark.parametrize(
    "change",
    [
        {"progress": {}},
        {"progress": {"step": "3"}},
        {"progress": {"step": 3, "skipped": None}},
        {"progress": {"step": 3}, "run_id": 7},
        {"progress": {"step": 3}, "run_id": None},
    ],
)
def test_a_checkpoint_that_does_not_say_its_step(change):
    """Sorting by it ended in a TypeError."""
    save_pt(Path("odd.pt"), small_payload(1) | change)
    refusal(summarize, Path("odd.pt"))


def test_a_summary_reads_no_tensors():
    """A folder of a hundred checkpoints of gigabytes is looked through at every save."""
    payload = small_payload(3)
    payload["model"]["large"] = torch.zeros(1000)
    save_pt(Path("a.pt"), payload)
    content = bytearray(Path("a.pt").read_bytes())
    content[content.index(payload["model"]["a"].numpy().tobytes()) + 5] ^= 1
    Path("a.pt").write_bytes(content)
    assert summarize(Path("a.pt")) == Summary("crash", 3, skipped=0, complete=True)
    assert "damaged" in refusal(load_checkpoint, Path("a.pt"))
    load_checkpoint(Path("a.pt"), verify=False)


# ---------------------------------------------------------------------------- shards

FOLDER = Path("pretrain-step-3-sharded")


def pieces(node: Any, rank: int) -> Any:
    """A rank's half of every tensor in nested dicts."""
    if isinstance(node, dict):
        return {key: pieces(value, rank) for key, value in node.items()}
    return node.chunk(2)[rank].clone() if torch.is_tensor(node) else node


def write_shards(step: int = 3, **changes: Any) -> dict[str, Any]:
    """A checkpoint of two ranks; returns its content."""
    payload = small_payload(step)
    FOLDER.mkdir(exist_ok=True)
    shards = {}
    for rank in range(2):
        own = {key: pieces(payload[key], rank) for key in ("model", "optimizer")}
        shards[f"shard-{rank}.pt"] = save_pt(FOLDER / f"shard-{rank}.pt", own)
    state = payload | {"model": {}, "optimizer": {}, "shards": shards}
    save_pt(FOLDER / STATE_FILE, state | changes)
    return payload


def test_shards_are_joined_in_the_order_of_the_ranks():
    """Whatever the order in which they were listed or written."""
    payload = write_shards()
    found = load_checkpoint(FOLDER)
    assert {len(shards) for shards in found["model"].values()} == {2}
    for key in small_payload(0):
        assert content_digest(joined(found[key])) == content_digest(payload[key])
    assert summarize(FOLDER) == Summary("crash", 3, skipped=0, complete=True)
    assert state_file(FOLDER) == FOLDER / STATE_FILE and state_file(Path("a.pt")) == Path("a.pt")


@pytest.mark.parametrize("name", ["shard-0.pt", "shard-1.pt", STATE_FILE])
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "missing", "folder"])
def test_a_damaged_shard_is_named(name, damage):
    """No rank trains on what another one's disk lost."""
    write_shards()
    path = FOLDER / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"flipped": content, "cut": content[:-100], "empty": b""}[damage])
    with pytest.raises(UsageError, match=name) as error:
        load_checkpoint(FOLDER)
    assert "\n" not in str(error.value)


def test_shards_of_another_step_are_found():
    """Each has a sound checksum, but not the one that is on the list."""
    write_shards(1)
    other = (FOLDER / "shard-1.pt").read_bytes()
    write_shards(3)
    (FOLDER / "shard-1.pt").write_bytes(other)
    assert "shard-1.pt is damaged" in refusal(load_checkpoint, FOLDER)


@pytest.mark.parametrize(
    "shards",
    [
        None, {}, [], {"../outside.pt": "0"}, {"a/../../outside.pt": "0"}, {1: "0"}, {"..": "0"},
        {"": "0"}, {"shard-0.pt": None}, {"missing.pt": None},
    ],
)  # fmt: skip
def test_a_list_of_shards_that_is_none(shards):
    """Nor does it lead out of the folder."""
    save_pt(Path("outside.pt"), {"model": {}, "optimizer": {}})
    write_shards(shards=shards)
    with pytest.raises(UsageError, match=FOLDER.name) as error:
        load_checkpoint(FOLDER)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(os.name == "nt", reason="Windows has absolute names of another kind")
def test_a_shard_with_an_absolute_name():
    """Joined to the folder's name it is a path elsewhere."""
    digest = save_pt(Path("outside.pt"), {"model": {}, "optimizer": {}})
    write_shards(shards={str(Path("outside.pt").absolute()): digest})
    assert "is not the name of a shard" in refusal(load_checkpoint, FOLDER)


@pytest.mark.parametrize(
    "own",
    [
        {"model": {}},
        {"model": {}, "optimizer": {}},
        {"model": {"a": torch.zeros(3)}, "optimizer": 3},
        {"model": {"a": torch.zeros(3), "b": torch.zeros(3)}, "optimizer": {"state": {0: 1}}},
    ],
)
def test_shards_that_do_not_belong_together(own):
    """Sound files of other content."""
    write_shards()
    digest = save_pt(FOLDER / "shard-1.pt", own)
    first = save_pt(
        FOLDER / "shard-0.pt",
        {key: pieces(small_payload(3)[key], 0) for key in ("model", "optimizer")},
    )
    write = small_payload(3) | {"model": {}, "optimizer": {}}
    save_pt(FOLDER / STATE_FILE, write | {"shards": {"shard-0.pt": first, "shard-1.pt": digest}})
    assert "do not belong together" in refusal(load_checkpoint, FOLDER)


@pytest.mark.parametrize("name", [STATE_FILE, "shard-1.pt"])
def test_code_in_a_sharded_checkpoint_is_never_run(name):
    """Its former format was a pickle; under a valid checksum, which anybody can make."""
    payload = small_payload(3)
    write_shards()
    own = {key: pieces(payload[key], 1) for key in ("model", "optimizer")}
    digest = save_pt(FOLDER / "shard-1.pt", own | {"evil": Malicious()})
    state = payload | {"model": {}, "optimizer": {}, "shards": {"shard-1.pt": digest}}
    if name == STATE_FILE:
        state |= {"options": Malicious()}
    save_pt(FOLDER / STATE_FILE, state)
    with pytest.raises(UsageError, match="none of it was run"):
        load_checkpoint(FOLDER)
    assert not Path("executed").exists()
