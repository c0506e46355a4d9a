"""Several ranks: as processes, as torchrun starts them but ten times sooner, or as threads.

The processes are forked from a server that has imported torch. As under torchrun the store is not
theirs: it outlives them. Where ranks are started again, it is torchrun's agent that does it.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from hurried import hurry
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import run_llama
from config import parse_options
from llama import Llama
from minllama.formats import find_model
from minllama.machine.ranks import Ranks, exit_at_once
from minllama.training import loop

TESTS = Path(__file__).resolve().parent
PATHS = os.pathsep.join((str(TESTS.parent), str(TESTS)))  # for a process that imports this first
# What ranks import that are started by fork: what a rank needs, with shards seconds of importing.
PRELOADED = ["several", "survivor", "torch._dynamo", "torch.distributed.fsdp"]
CONTEXT = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
SECONDS = 100  # after which ranks count as hanging

# ---------------------------------------------------------------------------- processes


class Launch:
    """Processes that run `work(rank)` side by side; none is left running after the block.

    With `nodes` they are on as many machines, one on each. What they print goes to one file.
    """

    def __init__(self, count: int, work: Callable[[int], int | None], *, nodes: int = 1) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.log = Path(f"output-{self.store.port}.txt").absolute()
        self.log.touch()
        shared = {
            "WORLD_SIZE": count,
            "GROUP_WORLD_SIZE": nodes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self.store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
        }
        self.processes = []
        for rank in range(count):
            own = {"RANK": rank, "LOCAL_RANK": rank // nodes, "GROUP_RANK": rank % nodes}
            setting = {name: str(value) for name, value in (shared | own).items()}
            self.processes.append(start_process(live, setting, str(self.log), work))

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def output(self) -> str:
        """All that was printed so far."""
        return self.log.read_text(encoding="utf-8")

    def wait(self) -> list[int]:
        """The exit statuses, by rank, when all have ended."""
        deadline = time.monotonic() + SECONDS
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            assert not process.is_alive(), f"hangs: {self.output()}"
        return [process.exitcode for process in self.processes]


def start_server() -> None:
    """Where there is fork, have processes start that have imported this module already."""
    if os.name != "nt":
        CONTEXT.set_forkserver_preload(PRELOADED)
        # The server starts with the first process, and finds what to import by this alone.
        from multiprocessing import forkserver

        with mock.patch.dict(os.environ, PYTHONPATH=PATHS):
            forkserver.ensure_running()


def start_process(target: Callable, *args: Any) -> Any:
    """A process of its own."""
    start_server()
    process = CONTEXT.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def live(setting: dict[str, str], log: str, work: Callable[[int], int | None]) -> None:
    """A rank's whole life."""
    os.environ.update(setting)
    print_to(log)
    status = 1
    try:
        status = work(int(setting["RANK"])) or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    exit_at_once(status)


def print_to(log: str) -> None:
    """Let all that this process prints go to a file."""
    output = open(log, "a", encoding="utf-8", buffering=1)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output


def run_restarted(count: int, words: list[str], *, fault: str) -> str:
    """Run a command on ranks that torchrun's agent starts, once again when one has ended.

    As `torchrun --standalone --max_restarts=1`, whose processes are forked here; returns what they
    printed.
    """
    config = LaunchConfig(
        *(1, 1, count),
        run_id="restarted",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=1,
        start_method=CONTEXT.get_start_method(),
        logs_specs=DefaultLogsSpecs(log_dir="agent"),
    )
    start_server()
    log = Path("output-restarted.txt").absolute()
    launch = functools.partial(elastic_launch(config, life), str(log), words, fault)
    # In a thread: in the main one the agent would keep handlers of signals after its end.
    agent = threading.Thread(target=launch, daemon=True)
    agent.start()
    agent.join(SECONDS)
    output = log.read_text(encoding="utf-8")
    if agent.is_alive():
        for process in multiprocessing.active_children():
            process.kill()
        raise AssertionError(f"hangs: {output}")
    return output


def life(log: str, words: list[str], fault: str) -> None:
    """One of the lives of a rank under torchrun's agent, to which it returns."""
    print_to(log)
    assert command(words, fault, int(os.environ["RANK"])) == 0


def run(
    count: int, words: list[str], *, fault: str = "none", nodes: int = 1, status: int = 0
) -> str:
    """Run a command on several ranks to its end; returns what they printed.

    RANK in the words is each rank's own number; all have to end with the exit status `status`.
    """
    with Launch(count, functools.partial(command, words, fault), nodes=nodes) as launch:
        found = launch.wait()
    assert found == [status] * count, launch.output()
    return launch.output()


def command(words: list[str], fault: str, rank: int) -> int:
    """The command as one rank has it."""
    words = [word.replace("RANK", str(rank)) for word in words]
    sys.argv = ["run_llama.py", *words]
    hurry()
    if fault != "none":
        FAULTS[fault](rank)
    return run_llama.main(parse_options(words))


def call(count: int, function: Callable[[Ranks], None]) -> str:
    """Call a function on connected ranks; returns what they printed.

    What it asserts on one of them is asserted here.
    """
    with Launch(count, functools.partial(connected, function)) as launch:
        assert launch.wait() == [0] * count, launch.output()
    return launch.output()


def connected(function: Callable[[Ranks], None], rank: int) -> None:
    """The function as one rank calls it."""
    ranks = Ranks.from_environment(timeout=30)
    with ranks.connected(use_gpu=False) as ranks:
        function(ranks)


# ---------------------------------------------------------------------------- faults


def on_steps(happen: Callable[[int], None]) -> None:
    """Call `happen(n)` at the beginning of the n-th optimizer step that this process makes.

    Steps made again after a rollback count again.
    """
    made, real = 0, loop.optimizer_step

    def optimizer_step(run: loop.Run, batches: loop.Prefetch) -> dict[str, Any]:
        nonlocal made
        made += 1
        happen(made)
        return real(run, batches)

    loop.optimizer_step = optimizer_step


def signalled(step: int, number: int, rank: int) -> None:
    """Rank 1 gets a signal in a step."""
    if rank == 1:
        on_steps(lambda made: os.kill(os.getpid(), number) if made == step else None)


def killed_once(rank: int) -> None:
    """Rank 1 is killed in step 7; in its next life it is not."""
    if rank == 1 and not Path("was-killed").exists():
        Path("was-killed").touch()
        signalled(7, signal.SIGKILL, rank)


def lossy(rank: int, change: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
    """Each loss on rank 1 is `change(step, loss)`."""
    real, now = Llama.loss, [0]
    on_steps(lambda made: now.__setitem__(0, made))

    def loss(*words: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss_sum, count = real(*words)
        return change(now[0], loss_sum), count

    if rank == 1:
        Llama.loss = loss


def without_memory(rank: int) -> None:
    """Memory runs out on rank 1 in step 3."""

    def fail(step: int, loss: torch.Tensor) -> torch.Tensor:
        if step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    lossy(rank, fail)


def not_finite(rank: int) -> None:
    """No loss of rank 1 is finite from step 5 on, until it is too often."""
    loop.MAX_SKIPPED = 3
    lossy(rank, lambda step, loss: loss * float("nan") if 5 <= step <= 7 else loss)


def without_the_model(rank: int) -> None:
    """Rank 1 cannot read the model that all start from."""

    def read(path: Path) -> None:
        raise AssertionError(f"rank {rank} reads {path}")

    if rank == 1:
        find_model.read_model = read


FAULTS: dict[str, Callable[[int], None]] = {
    "killed-once": killed_once,
    "without-memory": without_memory,
    "without-the-model": without_the_model,
    "not-finite": not_finite,
    "told-to-stop": functools.partial(signalled, 6, signal.SIGTERM),
    "silent": functools.partial(signalled, 6, getattr(signal, "SIGSTOP", 0)),
}

# ---------------------------------------------------------------------------- threads


def on_threads(
    count: int, work: Callable[[Ranks], Any], *, nodes: int = 1, timeout: float = 10
) -> list[Any]:
    """What `work` returns, or raises, on each of several ranks that are threads.

    What they do together goes through a store and gloo groups of their own.
    """
    per_node, store = count // nodes, dist.HashStore()
    results: list[Any] = [None] * count

    def work_as(rank: int) -> None:
        node, local_rank = divmod(rank, per_node)
        groups = [thread_group(f"group {n}", store, rank, count, timeout) for n in range(2)]
        ranks = Ranks(rank, count, local_rank, node, nodes, timeout=timeout)
        ranks = replace(ranks, store=store, group=groups[0], thread_group=groups[1])
        try:
            results[rank] = work(ranks)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work_as, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "hangs"
    return results


def thread_group(
    name: str, store: dist.Store, rank: int, count: int, timeout: float
) -> dist.ProcessGroup:
    """A gloo group of ranks that are threads, which torch.distributed itself does not know of."""
    store = dist.PrefixStore(name, store)
    backend = dist.ProcessGroupGloo(store, rank, count, timedelta(seconds=SECONDS))
    backend._set_default_timeout(timedelta(seconds=timeout))  # not while they connect
    group = dist.ProcessGroup(store, rank, count)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    return group
