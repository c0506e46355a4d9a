"""minllama/machine/sharding.py: one model on several ranks; checkpoints saved in shards."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import several
import torch
from running import assert_same
from torch import nn

from config import LlamaConfig
from llama import Llama, NextTokenLoss
from minllama.formats import pt_file
from minllama.formats.pt_file import STATE_FILE, load_pt, save_pt
from minllama.machine.ranks import Ranks, is_lost_peer
from minllama.machine.sharding import (
    broadcast_or_shard,
    distribute,
    full_state_dict,
    is_sharded,
    join_shards,
    load_optimizer_state,
    load_state,
    local_shards,
    no_gradient_sync,
    no_gradients,
    to_meta,
)
from minllama.runs import checkpoints as saving
from minllama.runs.checkpoints import Checkpoints, load_checkpoint, summarize
from minllama.runs.run_folder import RunFolder
from minllama.system import files
from minllama.system.errors import RunFailed, UsageError
from optimizer import make_optimizer

# ---------------------------------------------------------------------------- models


def small_llama(seed: int = 0) -> Llama:
    """A Llama of whose matrices some do not divide by two or three."""
    torch.manual_seed(seed)
    return Llama(LlamaConfig(vocab_size=17, dim=12, n_layers=2, n_heads=2, max_seq_len=8))


def train_a_step(module: nn.Module, model: Llama, optimizer: Any, tokens: torch.Tensor) -> None:
    """Two accumulated passes over a rank's rows, and an update."""
    targets = tokens.roll(-1, dims=1)
    with no_gradient_sync(module):
        module(tokens, targets)[0].backward()
    module(tokens.flip(0), targets.flip(0))[0].backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()


def train_together(ranks: Ranks) -> None:
    """Both ways of sharing a model train what one process trains, and each loads the other's."""
    rows = torch.randint(0, 17, (6, 8), generator=torch.Generator().manual_seed(1))
    whole = small_llama()
    first = copy.deepcopy(whole.state_dict())
    alone = make_optimizer(whole, name="adamw", lr=0.01, weight_decay=0.1)
    mean = NextTokenLoss(whole)
    for _ in range(2):
        # Both ranks' rows at once, at the mean of the ranks' losses.
        train_a_step(lambda *batch: (mean(*batch)[0] / ranks.world_size,), whole, alone, rows)
    for parallel in ("ddp", "fsdp"):
        with torch.device("meta" if parallel == "fsdp" else "cpu"):
            model = small_llama()
        module = distribute(
            NextTokenLoss(model),
            model.materialized_layers(),
            ranks=ranks,
            parallel=parallel,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        assert is_sharded(model) == (parallel == "fsdp")
        for name, tensor in full_state_dict(model, ranks).items():  # drawn a block at a time
            assert torch.equal(tensor, first[name]), name
        optimizer = make_optimizer(model, name="adamw", lr=0.01, weight_decay=0.1)
        own = rows.chunk(ranks.world_size)[ranks.rank]
        for _ in range(2):
            train_a_step(module, model, optimizer, own)
        state = full_state_dict(model, ranks)
        assert bool(state) == ranks.is_main
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, whole.state_dict()[name], atol=1e-5, rtol=0)
        with no_gradients(module):
            loss = module(own, own)[0].item()
        assert sum(ranks.gather(loss)) == pytest.approx(mean(rows, rows)[0].item(), abs=1e-4)
        assert is_sharded(model) == (parallel == "fsdp"), "evaluated, and sharded again"
        train_a_step(module, model, optimizer, own)
    # The last was sharded. What both ranks hold, joined, is what any number of ranks can load.
    parts = ranks.gather(local_shards([model.state_dict(), optimizer.state_dict()]))
    weights, moments = lists(*parts)
    full = full_state_dict(model, ranks)
    for name, tensor in full.items():
        assert torch.equal(join_shards(weights[name]), tensor)
    saved = dict(whole.state_dict()), alone.state_dict()
    load_together(ranks, model, optimizer, *saved)
    assert_same(dict(full_state_dict(model, ranks)), saved[0] if ranks.is_main else {})
    assert_same(joined(ranks, optimizer)["state"], saved[1]["state"])
    load_together(ranks, model, optimizer, weights, moments)
    assert_same(full_state_dict(model, ranks), full)
    assert_same(local_shards(optimizer.state_dict()), parts[ranks.rank][1])
    load_together(ranks, whole, alone, weights, moments)
    if ranks.is_main:
        assert_same(dict(whole.state_dict()), full)
    assert_same(joined(ranks, optimizer)["state"], alone.state_dict()["state"])
    # Muon's, which has two states.
    muon = [make_optimizer(whole, name="muon", lr=0.01, weight_decay=0.1) for _ in range(2)]
    train_a_step(lambda *batch: mean(*batch), whole, muon[0], rows)
    saved = copy.deepcopy([dict(whole.state_dict()), muon[0].state_dict()])
    train_a_step(lambda *batch: mean(*batch), whole, muon[0], rows)
    load_together(ranks, whole, muon[1], *saved)
    assert_same([dict(whole.state_dict()), muon[1].state_dict()], saved)


def load_together(
    ranks: Ranks, model: Llama, optimizer: Any, weights: dict[str, Any], moments: dict[str, Any]
) -> None:
    """Load what rank 0 alone has; the others know its shapes."""
    if not ranks.is_main:
        weights, moments = to_meta(weights), to_meta(moments)
    load_state(model, weights)
    load_optimizer_state(optimizer, moments)


def joined(ranks: Ranks, optimizer: Any) -> dict[str, Any]:
    """The whole of a sharded optimizer's state."""
    return whole_of(lists(*ranks.gather(local_shards(optimizer.state_dict()))))


def lists(*nodes: Any) -> Any:
    """Nested values of the ranks as a sharded checkpoint has them: a list for each tensor."""
    first = nodes[0]
    if torch.is_tensor(first):
        return list(nodes)
    if isinstance(first, dict):
        return {key: lists(*(node[key] for node in nodes)) for key in first}
    if isinstance(first, list):
        return [lists(*pair) for pair in zip(*nodes, strict=True)]
    return first


def whole_of(node: Any) -> Any:
    """Nested values with every list of tensors joined."""
    if isinstance(node, list) and node and torch.is_tensor(node[0]):
        return join_shards(node)
    if isinstance(node, dict):
        return {key: whole_of(value) for key, value in node.items()}
    return node


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.soak)])
def test_ranks_train_what_one_process_trains(count, tmp_path, monkeypatch):
    """With shards of unequal size too: 17 tokens on 2 ranks, 12 columns on 3."""
    monkeypatch.chdir(tmp_path)
    several.call(count, train_together)


def test_alone_a_model_is_left_as_it_is():
    module = nn.Linear(3, 2)
    same = distribute(
        module, [], ranks=Ranks(), parallel="fsdp", device=torch.device("cpu"), dtype=torch.float32
    )
    assert same is module and not is_sharded(module)
    assert full_state_dict(module, Ranks()).keys() == {"weight", "bias"}
    with no_gradients(module):
        assert not module(torch.zeros(3)).requires_grad


def test_one_process_loads_shards_of_any_number_and_no_others():
    module = nn.Linear(3, 5)
    state = {name: tensor.clone() + 1 for name, tensor in module.state_dict().items()}
    for count in (1, 2, 4, 8):  # of eight ranks, three have nothing
        load_state(module, {name: list(ranks_of(t, count)) for name, t in state.items()})
        assert_same(dict(module.state_dict()), state)
    with pytest.raises(ValueError, match=r"of shape \(4, 3\) where \(5, 3\) is asked for"):
        broadcast_or_shard([state["weight"][:2], state["weight"][3:]], module.weight)
    with pytest.raises(ValueError, match="tensor bias is missing or not of this model"):
        load_state(module, {"weight": state["weight"]})
    copied = broadcast_or_shard(state["bias"], module.bias)
    assert copied is not state["bias"] and torch.equal(copied, state["bias"])


def ranks_of(tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
    """A tensor's shards as FSDP2 makes them: the last ranks may have nothing."""
    chunks = list(tensor.chunk(count))
    return chunks + [tensor[:0]] * (count - len(chunks))


def test_a_loaded_optimizer_keeps_its_own_settings():
    """Learning rate and decay come from the flags, also after the checkpoint had others."""
    module = small_llama()
    optimizer = make_optimizer(module, name="adamw", lr=0.5, weight_decay=0.25)
    module(torch.zeros(1, 4, dtype=torch.long))[0].sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    other = make_optimizer(module, name="adamw", lr=0.1, weight_decay=0.0)
    load_optimizer_state(other, before)
    assert_same(other.state_dict()["state"], before["state"])
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.1]
    assert {group["weight_decay"] for group in other.param_groups} == {0.0}
    with pytest.raises((ValueError, LookupError)):
        load_optimizer_state(make_optimizer(nn.Linear(2, 2), name="adamw", lr=1, weight_decay=0),
                             before)  # fmt: skip


# ---------------------------------------------------------------------------- sharded checkpoints


def payload_of(step: int, rank: int, *, skipped: int = 0) -> dict[str, Any]:
    """What rank `rank` of two has to save after `step` steps."""
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(2, 3, 4, generator=generator)
    return {
        "model": {"a": weights[rank]},
        "optimizer": {"state": {0: {"step": step, "exp_avg": weights[rank] + 1}}},
        "scaler": {},
        "rng": {},
        "progress": {"step": step, "skipped": skipped},
        "identity": {},
        "run_id": "x",
    }


def assert_is_of(path: Path, step: int) -> None:
    """A checkpoint holds what two ranks saved after `step` steps."""
    found = load_checkpoint(path)
    assert found["progress"]["step"] == summarize(path).step == step
    for rank in range(2):
        expected = payload_of(step, rank)
        assert torch.equal(found["model"]["a"][rank], expected["model"]["a"])
        moments = found["optimizer"]["state"][0]
        assert moments["step"] == step
        assert torch.equal(moments["exp_avg"][rank], expected["optimizer"]["state"][0]["exp_avg"])


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    """The folder of a run whose two ranks are threads, which `save` makes."""
    return RunFolder(tmp_path / "run", "pretrain")


def save(
    folder: RunFolder, *steps: int, under: int | None = None, timeout: float = 5, **settings: Any
) -> list[Any]:
    """Two ranks save after each of some steps, and wait; returns what each raised or None."""

    def work(ranks: Ranks) -> None:
        save_as(ranks, folder, *steps, under=under, **settings)

    return several.on_threads(2, work, timeout=timeout)


def save_as(
    ranks: Ranks, folder: RunFolder, *steps: int, under: int | None = None, **settings: Any
) -> None:
    """What one of the ranks does in `save`."""
    checkpoints = Checkpoints(folder, ranks, sharded=True, keep_last=2)
    checkpoints.list_own("x")
    with checkpoints:
        for step in steps:
            checkpoints.after_step(step)
            state = payload_of(step, ranks.rank, **settings)
            checkpoints.save(state, folder.step_checkpoint(under or step))
    checkpoints.finish()


def names(folder: RunFolder) -> list[str]:
    """What is in a run's folder."""
    return sorted(path.name for path in folder.path.iterdir())


def test_ranks_save_together_what_one_process_reads(folder):
    """And the older of the run's checkpoints are deleted: two are kept."""
    assert save(folder, 1, 2, 3) == [None, None]
    assert names(folder) == ["pretrain-step-2-sharded", "pretrain-step-3-sharded"]
    path, _ = folder.find_checkpoint("auto")
    assert path == folder.path / "pretrain-step-3-sharded"
    assert_is_of(path, 3)
    assert len(list(path.iterdir())) == 3, "a file of each rank, and state.pt"


def test_ranks_save_without_their_launcher(folder):
    """They once waited for each other through its store, and ended without saving."""

    def work(ranks: Ranks) -> None:
        save_as(dataclasses.replace(ranks, parent=-1), folder, 1)

    assert several.on_threads(2, work) == [None, None]
    assert_is_of(folder.checkpoints()[0], 1)


def test_nothing_is_pruned_while_updates_are_skipped(folder):
    """The oldest may be the last good one, to which the run goes back."""
    save(folder, 1, 2, 3, skipped=1)
    assert len(folder.checkpoints()) == 3


def test_every_flipped_bit_and_truncation_is_detected(folder):
    """In every file of it; in the last bytes, which are the checksum, each one."""
    save(folder, 1)
    path = folder.checkpoints()[0]
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for place in [*range(0, len(content), 5), *range(len(content) - 90, len(content))]:
            with file.open("r+b") as damaged:
                damaged.seek(place)
                damaged.write(bytes([content[place] ^ 1 << place % 8]))
            assert_refused(path, "")
            with file.open("r+b") as damaged:
                damaged.seek(place)
                damaged.write(content[place : place + 1])
        for length in [*range(0, len(content), 97), len(content) - 1]:
            file.write_bytes(content[:length])
            assert_refused(path, file.name)
        file.write_bytes(content)
    assert_is_of(path, 1)


def assert_refused(path: Path, *words: str) -> None:
    """A checkpoint is refused in one line that has these words."""
    with pytest.raises(UsageError) as refused:
        load_checkpoint(path)
    message = str(refused.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_shard_of_another_save_is_detected(folder):
    """Each file is sound by itself; they only do not belong together."""
    save(folder, 1, 2)
    one, two = folder.checkpoints()
    mine, other = (next(path.glob("shard-1-*")) for path in (one, two))
    kept = mine.read_bytes()
    shutil.copy(other, mine)
    assert_refused(one, mine.name, "is damaged")
    mine.unlink()
    assert_refused(one, mine.name, "no such file")
    mine.write_bytes(kept)
    shutil.copy(two / STATE_FILE, one / STATE_FILE)
    assert_refused(one, "no such file")
    assert_is_of(two, 2)


def test_the_ranks_shards_may_not_be_exchanged_or_left_out(folder):
    """Joined in another order they would be another model."""
    save(folder, 1)
    path = folder.checkpoints()[0]
    state = load_pt(path / STATE_FILE)
    (one, digest), (two, other) = state["shards"].items()
    shutil.copy(path / one, folder.path / "x.pt")
    outside = {"../x.pt": digest, two: other}
    for shards in ({one: other, two: digest}, outside, {}, {1: digest}, [one]):
        save_pt(path / STATE_FILE, state | {"shards": shards})
        assert_refused(path)
    odd = save_pt(path / "odd.pt", {"model": {"b": torch.zeros(2)}, "optimizer": {}})
    save_pt(path / STATE_FILE, state | {"shards": {one: digest, "odd.pt": odd}})
    assert_refused(path, "do not belong together")


class Harm:
    """What touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("pickled_by", ["torch", "pickle"])
@pytest.mark.parametrize("where", [STATE_FILE, "shard"])
def test_code_in_a_checkpoint_is_never_run(folder, tmp_path, where, pickled_by):
    """Whoever writes a file can write the checksums that fit it as well."""
    save(folder, 1)
    path = folder.checkpoints()[0]
    harm, state = Harm(tmp_path / "harmed"), load_pt(path / STATE_FILE)
    name = STATE_FILE if where == STATE_FILE else next(iter(state["shards"]))
    payload = load_pt(path / name, verify=False) | {"harm": harm}
    if pickled_by == "torch":
        digest = save_pt(path / name, payload)
    else:
        content = pickle.dumps({"harm": harm, "model": {}})
        digest = hashlib.sha256(content).hexdigest()
        (path / name).write_bytes(content + pt_file.SEAL + digest.encode())
    if name != STATE_FILE:
        save_pt(path / STATE_FILE, state | {"shards": state["shards"] | {name: digest}})
    assert_refused(path, name)
    with pytest.raises(UsageError):
        load_pt(path / name, verify=False)
    with pytest.raises(UsageError, match="no whole pretrain checkpoint"):
        folder.find_checkpoint("auto")
    assert not (tmp_path / "harmed").exists()


def test_a_folder_without_its_state_is_no_checkpoint(folder):
    """It is what a killed save leaves: not resumed, and removed at the next start."""
    save(folder, 1, 2)
    one, two = folder.checkpoints()
    (two / STATE_FILE).unlink()
    assert folder.checkpoints() == [one] and folder.find_checkpoint("auto")[0] == one
    assert_refused(two, "state.pt", "no such file")
    RunFolder(folder.path, "finetune-sst").remove_incomplete()
    assert two.exists(), "another run's files are not touched"
    folder.remove_incomplete()
    assert names(folder) == [one.name]
    assert_is_of(one, 1)


@pytest.fixture
def watched(monkeypatch) -> Callable[[Callable[[], None]], None]:
    """Calls a function before and after each change that a save makes to the disk."""
    lock = threading.RLock()

    def watch(look: Callable[[], None]) -> None:
        for owner, name in [
            (pt_file.SealingFile, "_pass_on"),
            (files.os, "fsync"),
            (files.os, "replace"),
            (files.os, "unlink"),
            (Path, "mkdir"),
            (files.shutil, "rmtree"),
        ]:
            real = getattr(owner, name)

            def change(*args: Any, real: Callable = real, **kwargs: Any) -> Any:
                with lock:
                    look()
                    result = real(*args, **kwargs)
                    if real.__name__ == "_pass_on":  # else what is in the buffer is not seen
                        args[0].file.flush()
                    look()
                return result

            monkeypatch.setattr(owner, name, change)

    return watch


def test_killed_between_any_two_writes_a_checkpoint_is_whole(folder, tmp_path, watched):
    """At each moment of a second save under the name of the first, and while one is pruned."""
    save(folder, 1, 2)
    kept = folder.path / "pretrain-step-1-sharded"
    moments: dict[tuple, Path] = {}
    looking = False

    def look() -> None:
        nonlocal looking
        present = tuple((str(p), p.stat().st_size // 1000) for p in sorted(folder.path.rglob("*")))
        if not looking and present not in moments:
            looking = True
            moments[present] = tmp_path / "moments" / str(len(list(tmp_path.glob("moments/*"))))
            shutil.copytree(folder.path, moments[present])
            looking = False

    watched(look)
    assert save(folder, 3, under=1) == [None, None]
    assert_is_of(kept, 3)
    assert len(list(kept.iterdir())) == 3, "the shards of the first save are deleted"
    steps = []
    for place in moments.values():
        killed = RunFolder(place, "pretrain")
        killed.remove_incomplete()
        assert names(killed) == names(folder)
        steps.append(summarize(place / kept.name).step)
        assert_is_of(place / kept.name, steps[-1])
    assert len(steps) > 9 and steps == sorted(steps) and {*steps} == {1, 3}
    moments.clear()
    assert save(folder, 4) == [None, None]
    assert kept in folder.checkpoints() and len(folder.checkpoints()) == 2, "step 2 is pruned"
    for place in moments.values():
        whole = RunFolder(place, "pretrain").checkpoints()
        assert len(whole) >= 2
        for path in whole:
            assert_is_of(path, summarize(path).step)


def test_a_step_that_raises_lets_a_begun_checkpoint_be_whole(folder, monkeypatch):
    """It is there although the run ends with an error while it is written, which all see."""
    real = save_pt

    def slow(path: Path, payload: dict[str, Any]) -> str:
        time.sleep(0.2)
        return real(path, payload)

    monkeypatch.setattr(saving, "save_pt", slow)
    assert [str(error) for error in raising(folder)] == ["in step 2"] * 2
    assert_is_of(folder.checkpoints()[0], 1)


def test_a_rank_that_is_gone_is_not_waited_for_long(folder, monkeypatch):
    """The error that ends the run is the one that is said; there is no half of a checkpoint."""
    monkeypatch.setattr(saving, "GRACE", 0.3)
    began = time.monotonic()
    assert str(raising(folder, gone=1)[0]) == "in step 2" and time.monotonic() - began < 3
    assert not folder.checkpoints()


def raising(folder: RunFolder, *, gone: int | None = None) -> list[Any]:
    """What two ranks raise whose run fails in the step after a save; one may be gone by then."""

    def work(ranks: Ranks) -> None:
        checkpoints = Checkpoints(folder, ranks, sharded=True, keep_last=2)
        with checkpoints:
            if ranks.rank == gone:
                ranks.on_main(lambda: None)  # the folder is made
                return
            checkpoints.save(payload_of(1, ranks.rank))
            raise RunFailed("in step 2")

    return several.on_threads(2, work, timeout=2)


def slow_shard(monkeypatch: pytest.MonkeyPatch, *, signs: float) -> None:
    """Rank 1 takes three timeouts to write its shard, with signs of life every so many seconds."""
    real = save_pt

    def slow(path: Path, payload: dict[str, Any]) -> str:
        if path.name.startswith("shard-1"):
            time.sleep(1.5)
        return real(path, payload)

    monkeypatch.setattr(saving, "save_pt", slow)
    monkeypatch.setattr("minllama.machine.ranks.SIGN_OF_LIFE", signs)


def test_a_rank_may_write_for_long(folder, monkeypatch):
    slow_shard(monkeypatch, signs=0.05)
    assert save(folder, 1, timeout=0.5) == [None, None]
    assert_is_of(folder.checkpoints()[0], 1)


def test_a_rank_that_falls_silent_while_it_writes_is_named(folder, monkeypatch):
    """Rank 0 once waited for its shard for ever."""
    slow_shard(monkeypatch, signs=60)
    monkeypatch.setattr("minllama.machine.ranks.REPORT_WITHIN", 0.2)
    messages = []

    def work(ranks: Ranks) -> None:
        with pytest.raises(RuntimeError) as error:
            save_as(ranks, folder, 1)
        assert is_lost_peer(error.value)
        messages.append(ranks.lost_peer_message())

    assert several.on_threads(2, work, timeout=0.5) == [None, None]
    assert messages[0].startswith("rank 1 of 2 ended, or did not answer for --dist_timeout 0.5")


@pytest.mark.parametrize("failing", ["shard-0", "shard-1", STATE_FILE])
def test_a_disk_that_fails_leaves_the_checkpoint_as_it_was(folder, monkeypatch, capsys, failing):
    """Nor is anything left of the failed save, which could fill the disk.

    It is tried again after the next step, and the last at the end, where it fails the run.
    """
    save(folder, 1)
    kept = folder.checkpoints()[0]
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    real, left = save_pt, [1]

    def fail(path: Path, payload: dict[str, Any]) -> str:
        if path.name.startswith(failing) and left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        return real(path, payload)

    monkeypatch.setattr(saving, "save_pt", fail)
    assert save(folder, 2, 3) == [None, None]
    assert capsys.readouterr().out.count("warning: checkpoint was not written") == 2, "by each rank"
    assert names(folder) == [kept.name, "pretrain-step-3-sharded"]
    assert_is_of(folder.checkpoints()[1], 3)
    left[0] = 2
    for error in save(folder, 4, under=1):
        assert isinstance(error, RunFailed) and "checkpoint was not written (No space" in str(error)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert names(folder) == [kept.name, "pretrain-step-3-sharded"]
    assert save(folder, 4, under=1) == [None, None]
    assert_is_of(kept, 4)


def test_a_file_of_rank_0_alone_puts_no_rank_out_of_step(folder, tmp_path):
    """The others once took what rank 0 did for its profile for what it did next."""

    def work(ranks: Ranks) -> list[str]:
        checkpoints = Checkpoints(folder, ranks, sharded=True, keep_last=2)
        if ranks.is_main:
            checkpoints.save_file(tmp_path / "profile", (tmp_path / "profile").touch)
        return [ranks.on_main(lambda: "first"), ranks.on_main(lambda: "second")]

    assert several.on_threads(2, work) == [["first", "second"]] * 2
    assert (tmp_path / "profile").exists()
