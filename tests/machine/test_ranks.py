"""minllama/machine/ranks.py: who a process is, what ranks do together, and noticing who is gone."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import several
import torch
import torch.distributed as dist

from minllama.machine import ranks as room
from minllama.machine.ranks import Ranks, attempt, check_runs_alone, is_lost_peer, launch_name
from minllama.system.errors import Interrupted, RunFailed, UsageError
from minllama.system.signals import StopRequest

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
MORE = {"LOCAL_RANK": "1", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def own_environment(tmp_path, monkeypatch):
    """No test finds what started the tests in its environment."""
    monkeypatch.chdir(tmp_path)
    for name in (*TORCHRUN, *MORE, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


# ---------------------------------------------------------------------------- who a process is


def test_a_rank_is_what_the_launcher_says(monkeypatch):
    assert Ranks.from_environment() == Ranks()
    for name, value in (TORCHRUN | MORE | {"TORCHELASTIC_RUN_ID": "job 7"}).items():
        monkeypatch.setenv(name, value)
    found = Ranks.from_environment(timeout=5)
    assert found == Ranks(3, 4, 1, node=1, nodes=2, launch="job 7", timeout=5)
    assert not found.is_main and found.note("fsdp") == "; 4 processes on 2 machines, fsdp"
    with pytest.raises(UsageError, match="--option prompt runs in one process"):
        check_runs_alone("--option prompt")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set without RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment is not a whole number"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 in the environment is not"),
        (TORCHRUN, "WORLD_SIZE=4 is set without LOCAL_RANK"),  # plain srun: all took GPU 0
    ],
)
def test_an_environment_that_is_half_set_is_refused(monkeypatch, setting, message):
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        Ranks.from_environment()


def test_a_rank_that_slurm_started_has_a_gpu_of_its_own(monkeypatch):
    """With plain srun, which sets no LOCAL_RANK, all processes of a machine took GPU 0."""
    slurm = {"SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NNODES": "2"}
    for name, value in (TORCHRUN | slurm).items():
        monkeypatch.setenv(name, value)
    assert Ranks.from_environment() == Ranks(3, 4, 1, node=1, nodes=2)


def test_a_rank_alone_is_not_several(monkeypatch):
    """RANK=1 without WORLD_SIZE, as some shells inherit it, once trained in silence."""
    monkeypatch.setenv("RANK", "1")
    assert Ranks.from_environment().is_main
    assert Ranks().note("ddp") == "" and "no effect" in Ranks().note("fsdp")


def test_a_launch_is_known_by_its_id_or_its_process(monkeypatch):
    """torchrun's own word for a launch without an id is the same for all launches."""
    assert launch_name() is None and not Ranks().is_launch_of({"launch": None})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    assert Ranks.from_environment().is_launch_of({"launch": "job 7"})
    assert not Ranks.from_environment().is_launch_of({"launch": "job 8"})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    own = launch_name()
    assert own == launch_name() and len(json.loads(own)) == 3
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert launch_name() != own


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_work_is_split_evenly_and_each_part_counted_once(count, world_size):
    split = [list(Ranks(rank, world_size).split_evenly(count)) for rank in range(world_size)]
    assert len({len(of_rank) for of_rank in split}) == 1
    counted = sorted(number for of_rank in split for number, counts in of_rank if counts)
    assert counted == list(range(count))
    assert all(number < count for of_rank in split for number, _ in of_rank)


# ---------------------------------------------------------------------------- together


def do_all_together(ranks: Ranks) -> None:
    """Every method of two connected ranks once, and what ranks without a launcher do not have."""
    rank = ranks.rank
    assert ranks.sum_array(np.array([[rank, 2]])).tolist() == [[1, 4]]
    numbers = ranks.gather_numbers(torch.tensor([rank, 0.5]), 80_000_000_001)
    assert numbers == [[0, 0.5, 80_000_000_001], [1, 0.5, 80_000_000_001]]
    assert ranks.gather({"rank": rank, "x": torch.tensor(rank)})[1] == {"rank": 1, "x": 1}
    assert ranks.on_all(lambda: rank) == rank and ranks.on_main(lambda: rank) == 0
    assert ranks.first_on_node(lambda: rank, then=lambda: 10 + rank) == (0, 11)[rank]
    fail = UsageError(f"wrong on rank {rank}")
    with pytest.raises(UsageError, match="wrong on rank 1"):
        ranks.on_all(lambda: raises(fail) if rank == 1 else None)
    with pytest.raises(UsageError, match="wrong on rank 0"):
        ranks.on_main(lambda: raises(fail))
    stop = StopRequest()
    assert not ranks.agree_to_stop(stop)
    if rank == 1:
        stop.signal_number = 15
    with pytest.raises(Interrupted):
        ranks.check_stop(stop)
    assert stop.exit_status == 143
    reported = ranks.gather(ranks.should_report("the same error"))
    assert sorted(reported) == [False, True]
    assert all(ranks.gather(ranks.should_report(f"of {rank}")))
    print(f"printed by rank {rank}")


def raises(error: Exception) -> None:
    raise error


def test_two_processes_do_all_together():
    """Only rank 0 prints: a line of each rank once stood in every log.

    So did torch's warning of a name that is deprecated.
    """
    output = several.call(2, do_all_together)
    assert "printed by rank 0" in output and "rank 1" not in output
    assert "Warning" not in output


def test_alone_everything_is_done_at_once():
    ranks = Ranks()
    with ranks.connected(use_gpu=False):
        assert ranks.sum_array(np.ones(1)) == 1 and ranks.gather("x") == ["x"]
        assert ranks.on_all(int) == ranks.on_main(int) == ranks.first_on_node(int, then=str) == 0
        assert ranks.should_report("anything")
    with pytest.raises(ZeroDivisionError):
        ranks.on_main(lambda: 1 / 0)


@pytest.fixture
def quick_signs(monkeypatch):
    """Signs of life every 50 ms."""
    monkeypatch.setattr(room, "SIGN_OF_LIFE", 0.05)


def test_long_work_of_rank_0_is_no_hang(quick_signs):
    """It may take any time, with a sign of life now and then: three timeouts here."""

    def work() -> str:
        time.sleep(1.5)
        return "done"

    assert several.on_threads(3, lambda ranks: ranks.on_main(work), timeout=0.5) == ["done"] * 3


def test_the_others_are_told_what_rank_0_need_not_send():
    """Rank 0 itself has the very object, which may be too large to send."""
    large = object()

    def work(ranks: Ranks) -> object:
        return ranks.on_main(lambda: large, tell=lambda value: "told")

    assert several.on_threads(2, work) == [large, "told"]


def test_work_without_a_sign_of_life_is_given_up_by_name(monkeypatch):
    """The rank that is silent finds, when it wakes up, that the others are gone."""
    monkeypatch.setattr(room, "SIGN_OF_LIFE", 60)
    monkeypatch.setattr(room, "REPORT_WITHIN", 0.2)
    began = time.monotonic()

    def work() -> None:
        time.sleep(1)

    def report(ranks: Ranks) -> str:
        with pytest.raises(RuntimeError) as error:
            ranks.on_main(work)
        assert is_lost_peer(error.value)
        return ranks.lost_peer_message()

    messages = several.on_threads(2, report, timeout=0.3)
    assert messages[1].startswith("rank 0 of 2 ended, or did not answer for --dist_timeout 0.3")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("quiet", [0, 1, 2])
def test_a_rank_that_is_gone_during_long_work_is_named(quick_signs, monkeypatch, quiet):
    """Not the one that still works, which had no time to note whom it misses."""
    monkeypatch.setattr(room, "REPORT_WITHIN", 0.2)

    def report(ranks: Ranks) -> str | None:
        if ranks.rank == quiet:
            return None
        with pytest.raises(RuntimeError) as error:
            ranks.on_main(lambda: time.sleep(1))
        assert is_lost_peer(error.value)
        return ranks.lost_peer_message()

    messages = several.on_threads(3, report, timeout=0.3)
    messages.pop(quiet)
    assert all(message.startswith(f"rank {quiet} of 3 ended") for message in messages)


@pytest.mark.parametrize(
    "error",
    [UsageError("bad"), RunFailed("failed"), Interrupted(), OSError(28, "full", "a.pt")],
    ids=lambda error: type(error).__name__,
)
def test_what_rank_0_raises_all_raise(error):
    for found in several.on_threads(2, lambda ranks: ranks.on_main(lambda: raises(error))):
        assert type(found) is type(error) and str(found) == str(error)


def test_an_error_nobody_expected_reaches_all_with_its_traceback():
    for found in several.on_threads(2, lambda ranks: ranks.on_main(lambda: 1 / 0)):
        assert isinstance(found, RunFailed) and "ZeroDivisionError" in str(found)


def test_each_machine_does_long_work_once_and_first(quick_signs):
    """What it returns stays in its process: it may be the whole text of the training."""
    order, unpicklable = [], threading.Lock()

    def work_on(ranks: Ranks) -> object:
        def work() -> object:
            if ranks.local_rank == 0:
                time.sleep(0.2 * ranks.node)
            order.append(ranks.rank)
            return unpicklable

        return ranks.first_on_node(work, then=work)

    assert several.on_threads(4, work_on, nodes=2) == [unpicklable] * 4
    assert order[:2] == [0, 2] and sorted(order) == [0, 1, 2, 3]


def test_a_rank_that_fails_does_not_wait_for_those_who_wait_for_it(quick_signs):
    """In taking over a checkpoint one failed, the others waited in a collective for its part, and
    it for the end of their work: ten minutes without a word of the cause."""
    left = threading.Event()

    def on_rank(ranks: Ranks) -> bool:
        if ranks.is_main:
            waited: list[bool] = []
            with pytest.raises(UsageError, match="no such tensor"):
                ranks.on_all(lambda: waited.append(left.wait(10)))
            return waited[0]
        try:
            ranks.on_all(lambda: raises(UsageError("no such tensor")))
        except UsageError:
            left.set()
        return left.is_set()

    assert several.on_threads(2, on_rank) == [True, True]


def test_long_work_that_fails_on_one_machine_fails_on_all():
    def work_on(ranks: Ranks) -> str:
        def work() -> str:
            return raises(UsageError("no text")) if ranks.node else "text"

        return ranks.first_on_node(work, then=work)

    found = several.on_threads(4, work_on, nodes=2)
    assert [str(error) for error in found] == ["no text"] * 4


# ---------------------------------------------------------------------------- starting


def test_a_restart_does_not_meet_the_dead():
    """Restarted ranks once found the addresses of the dead in the launcher's store, and waited."""
    store = dist.HashStore()

    def start(ranks: Ranks) -> str:
        if ranks.rank == 1:
            time.sleep(0.1)  # rank 0 sees the mark of the dead one first
        return ranks._start_name(store)

    starts = [several.on_threads(3, start) for _ in range(3)]
    assert all(len(set(names)) == 1 for names in starts)
    assert len({names[0] for names in starts}) == 3


def test_a_rank_that_does_not_come_ends_the_wait():
    store = dist.HashStore()
    several.on_threads(2, lambda ranks: ranks._start_name(store))
    for rank in range(2):
        with pytest.raises(RunFailed, match="not all of 2 processes came within --dist_tim"):
            Ranks(rank, 2, timeout=0.2)._start_name(store)


# ---------------------------------------------------------------------------- errors


def test_the_lost_one_is_named_by_those_who_miss_it(monkeypatch):
    """Unless a rank has said why it ends: then nothing is to be added."""
    monkeypatch.setattr(room, "REPORT_WITHIN", 0.2)

    def report(ranks: Ranks) -> str | None:
        return None if ranks.rank == 1 else ranks.lost_peer_message()

    first, _, third = several.on_threads(3, report)
    assert first == third and first.startswith("rank 1 of 3 ended, or did not answer for")
    store = dist.HashStore()
    store.add("errors", 1)
    assert Ranks(0, 3, store=store).lost_peer_message() is None


def test_a_rank_that_has_lost_its_launcher_says_so_too():
    assert Ranks(1, 2).lost_peer_message().startswith("another process of 2 ended")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (dist.DistNetworkError("The client socket has timed out"), True),
        (RuntimeError("Timed out waiting 3000ms for recv operation to complete"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("bad"), False),
        (ValueError("--train gloo.txt: no sentence"), False),
        (NotImplementedError("NCCL.txt"), False),
    ],
)
def test_a_lost_peer_is_told_from_other_errors(error, lost):
    assert is_lost_peer(error) == lost
    if lost:
        with pytest.raises(type(error)):
            attempt(lambda: raises(error))


def test_an_error_that_is_sent_to_others_keeps_what_the_user_needs():
    value, error = attempt(lambda: Path("nowhere/x").open())
    assert value is None and error.filename == "nowhere/x" and error.errno == 2
    assert attempt(lambda: 3) == (3, None)
