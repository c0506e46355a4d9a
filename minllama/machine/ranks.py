"""Several processes as one run: who they are, what they do together, and noticing who is gone.

A method that all ranks take part in must be called by every rank, in the same order; alone it
costs nothing. Knows nothing of models: `minllama.machine.sharding` distributes those.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from minllama.system.errors import Interrupted, RunFailed, UsageError
from minllama.system.signals import StopRequest

T = TypeVar("T")
LAUNCHER_GONE = "the launcher of this process ended without it"
SIGN_OF_LIFE = 0.5  # seconds between those of a rank with long work: below any --dist_timeout
REPORT_WITHIN = 2.0  # seconds within which all ranks that miss another have noted it
BUSY = "busy"  # what a rank tells the others as long as its work goes on


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run, as torchrun describes it in the environment.

    A rank that waits in vain raises torch's RuntimeError, which `is_lost_peer` recognises. Numbers
    go through torch's default group, objects through gloo groups of their own, since they are
    exchanged while the default group is busy.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    node: int = 0
    nodes: int = 1
    launch: str | None = None  # names the launcher, the same for all its restarts; None: none
    parent: int | None = field(default=None, compare=False)  # the launcher's process
    timeout: int = 600  # seconds without a sign of life after which another process is lost
    # Set by `connected`. The store holds notes that no other rank has to wait for.
    store: dist.Store | None = field(default=None, compare=False, repr=False)
    group: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)
    thread_group: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)

    @classmethod
    def from_environment(cls, *, timeout: int = 600) -> Ranks:
        """What torchrun set; a process started alone is rank 0 of 1. Raises UsageError."""

        def number(name: str, default: int) -> int:
            text = os.environ.get(name, str(default))
            if not text.isdecimal():
                raise UsageError(
                    f"{name}={text} in the environment is not a whole number: unset it"
                )
            return int(text)

        parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None  # that is torchrun
        alone = cls(launch=launch_name(), parent=parent, timeout=timeout)
        world_size = number("WORLD_SIZE", 1)
        if world_size == 1:  # then a RANK that something else has set means nothing
            return alone
        if not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise UsageError(
                f"WORLD_SIZE={world_size} is set without RANK, MASTER_ADDR and MASTER_PORT: start "
                "several processes with torchrun, or unset it"
            )
        if not {"LOCAL_RANK", "SLURM_LOCALID"} & os.environ.keys():  # all would take GPU 0
            raise UsageError(
                f"WORLD_SIZE={world_size} is set without LOCAL_RANK, a process's number on its "
                "machine: start several processes with torchrun, or set it"
            )
        return replace(
            alone,
            rank=number("RANK", 0),
            world_size=world_size,
            # Slurm has names of its own for what torchrun tells.
            local_rank=number("LOCAL_RANK", number("SLURM_LOCALID", 0)),
            node=number("GROUP_RANK", number("SLURM_NODEID", 0)),
            nodes=number("GROUP_WORLD_SIZE", number("SLURM_NNODES", 1)),
        )

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes the files that are written once."""
        return self.rank == 0

    def is_launch_of(self, record: dict[str, Any]) -> bool:
        """Whether the run on record was started by this same launch, so that this continues it."""
        return self.launch is not None and record.get("launch") == self.launch

    def launcher_is_gone(self) -> bool:
        """Whether the launcher ended without its processes: nobody would restart or stop them."""
        return self.parent not in (None, os.getppid())

    def note(self, parallel: str) -> str:
        """How many processes there are and how they share the work, for the line of the device."""
        if self.world_size == 1:
            return (
                "" if parallel == "ddp" else f"; one process: --parallel {parallel} has no effect"
            )
        machines = f" on {self.nodes} machines" if self.nodes > 1 else ""
        return f"; {self.world_size} processes{machines}, {parallel}"

    @contextlib.contextmanager
    def connected(self, *, use_gpu: bool) -> Iterator[Ranks]:
        """These ranks, joined to the other processes within the block; rank 0 alone prints."""
        if self.world_size == 1:
            yield self
            return
        backend = "cpu:gloo,cuda:nccl" if use_gpu and torch.cuda.is_available() else "gloo"
        limit = timedelta(seconds=self.timeout)
        store = next(dist.rendezvous("env://", self.rank, self.world_size, timeout=limit))[0]
        store = dist.PrefixStore(self._start_name(store), store)
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.world_size, timeout=limit
        )
        group, thread_group = (dist.new_group(backend="gloo", timeout=limit) for _ in range(2))
        with contextlib.ExitStack() as stack:
            if not self.is_main:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield replace(self, store=store, group=group, thread_group=thread_group)
        dist.destroy_process_group()  # not after an error: it would wait for those who are gone

    def for_thread(self) -> Ranks:
        """The same ranks for one thread beside the training: for `gather`, `on_all`, `on_main`."""
        return replace(self, group=self.thread_group)

    def _start_name(self, store: dist.Store) -> str:
        """A name that the processes of this start share, and those of no other. Raises RunFailed.

        A launcher that restarts a run keeps its store, with the addresses of the dead in it, which
        torch would take for those of the living. Its count of restarts is no name, since each
        machine's launcher counts its own. So each rank 0 takes a new number, and answers with the
        marks that it finds under it. A rank that comes before its rank 0 sees the number of a dead
        one, which never answers with its mark.
        """
        mark, deadline = uuid.uuid4().hex, time.monotonic() + self.timeout
        number = store.add("starts", 1) if self.is_main else 0
        # Polled, since a blocking wait could neither look for a new number nor be interrupted.
        while time.monotonic() < deadline:
            name = f"start {number or store.add('starts', 0)}"
            store.set(f"{name} rank {self.rank}", mark)
            marks = [f"{name} rank {rank}" for rank in range(self.world_size)]
            if self.is_main and store.check(marks):
                store.set(name, b" ".join(map(store.get, marks)))
            if store.check([name]) and mark in store.get(name).decode():
                return name
            time.sleep(0.02)
        raise RunFailed(
            f"not all of {self.world_size} processes came within --dist_timeout {self.timeout} "
            "seconds"
        )

    # ------------------------------------------------------------------------ numbers and values

    def sum_array(self, values: np.ndarray) -> np.ndarray:
        """The sum of an array over all ranks, element by element."""
        if self.world_size == 1:
            return values
        total = torch.from_numpy(values.copy())
        dist.all_reduce(total)
        return total.numpy()

    def gather_numbers(self, computed: torch.Tensor, *known: float) -> list[list[float]]:
        """By rank: numbers (n,) that its device computed, and others that are known without it.

        In one exchange, on that device, for which the host waits once.
        """
        if self.world_size == 1:
            return [[*computed.tolist(), *known]]
        own = computed.double()
        own = torch.cat([own, *(own.new_full((1,), number) for number in known)])
        numbers = own.new_empty(self.world_size * len(own))
        # Which torch 2.13 renamed, and warns of the old name.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(numbers, own)
        return numbers.view(self.world_size, -1).tolist()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, plain or tensors on the CPU, by rank."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def split_evenly(self, count: int) -> Iterator[tuple[int, bool]]:
        """This rank's numbers of those below `count`, equally many on every rank.

        A rank with one fewer than others repeats the last number, marked False: it does not count.
        """
        for first in range(0, count, self.world_size):
            number = first + self.rank
            yield min(number, count - 1), number < count

    def agree_to_stop(self, stop: StopRequest) -> bool:
        """Whether any rank was asked to stop; then every rank's `stop` says so."""
        if self.world_size == 1:
            return stop.requested
        number = torch.tensor(stop.signal_number or 0)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        if number and not stop.requested:
            stop.signal_number = int(number)
        return bool(number)

    def check_stop(self, stop: StopRequest) -> None:
        """Raise Interrupted on all ranks if one was asked to stop: where nothing is to be saved."""
        if self.agree_to_stop(stop):
            raise Interrupted

    # ------------------------------------------------------------------------ work

    def on_all(self, work: Callable[[], T]) -> T:
        """Do something on every rank, however long; what one of them raises, all do.

        One whose work fails raises at once: others may be waiting for it within theirs. Meanwhile a
        thread exchanges signs of life through `group`: `work` may use torch's default group, but
        must not call `gather` or `on_main`.
        """
        if self.world_size == 1:
            return work()
        own_error: Future[Exception | None] = Future()  # known when the work has ended
        thread = ThreadPoolExecutor(1)
        errors = thread.submit(self._exchange_errors, own_error)
        thread.shutdown(wait=False)  # an interrupted rank does not wait for the others
        value, own = attempt(work)
        own_error.set_result(own)
        for state in errors.result():
            if isinstance(state, Exception):
                raise state
        return value

    def _exchange_errors(self, own_error: Future[Exception | None]) -> list[Any]:
        """Each rank's error or None, by rank, once the work of all has ended, or of one failed.

        The exchange is repeated until then, so that work of any length keeps within the timeout of
        torch's collectives, while a rank that is killed or stopped does not.
        """
        states: list[Any] = [BUSY]
        try:
            while BUSY in states and not any(isinstance(state, Exception) for state in states):
                wait([own_error], SIGN_OF_LIFE)
                states = self.gather(own_error.result() if own_error.done() else BUSY)
        except RuntimeError:
            # Noted at once, for this rank's own work may go on for long: see lost_peer_message.
            with contextlib.suppress(RuntimeError):  # the launcher is gone, and its store
                self.store.set(f"rank {self.rank} misses", "others")
            raise
        return states

    def on_main(
        self, work: Callable[[], T], *, tell: Callable[[T], Any] = lambda value: value
    ) -> T:
        """Do something on rank 0 alone, however long; what it returns or raises, all do.

        Ranks other than 0 return what `tell` makes of it, where not all of it is to be sent.
        """
        if self.world_size == 1:
            return work()

        def work_and_tell() -> tuple[T, Any]:
            value = work()
            return value, tell(value)

        value, told = self.on_all(work_and_tell if self.is_main else lambda: (None, None))
        values = [told]  # filled in by the broadcast
        dist.broadcast_object_list(values, group_src=0, group=self.group)
        return value if self.is_main else values[0]

    def first_on_node(self, work: Callable[[], T], *, then: Callable[[], T]) -> T:
        """Do something long on one process of each machine, and `then` on the others what is quick
        once that is done."""
        value = self.on_all(work if self.local_rank == 0 else lambda: None)
        return value if self.local_rank == 0 else then()

    # ------------------------------------------------------------------------ errors

    def should_report(self, message: str) -> bool:
        """Whether this process prints an error: of those that have the same one, the first."""
        if self.store is None or self.launcher_is_gone():  # every rank knows that by itself
            return self.is_main
        try:
            self.store.add("errors", 1)
            digest = hashlib.sha256(message.encode()).hexdigest()
            return self.store.add(f"error {digest}", 1) == 1
        except RuntimeError:  # the launcher is gone, and its store
            return True

    def lost_peer_message(self) -> str | None:
        """What to report of processes that ended or hang; None where one of them said why.

        Through the store: in torch's `monitored_barrier` rank 0 alone learns who is missing, and
        may itself be gone.
        """
        missing = "another process"
        if self.store is not None:
            with contextlib.suppress(RuntimeError):  # the launcher is gone, and its store
                self.store.set(f"rank {self.rank} misses", "others")
                time.sleep(REPORT_WITHIN)  # until every rank that is left has noted the same
                if self.store.add("errors", 0):
                    return None
                ranks = range(self.world_size)
                lost = [rank for rank in ranks if not self.store.check([f"rank {rank} misses"])]
                missing = f"rank {' and '.join(map(str, lost))}" if lost else missing
        return (
            f"{missing} of {self.world_size} ended, or did not answer for --dist_timeout "
            f"{self.timeout} seconds, so all end; --resume auto continues from the last checkpoint"
        )


def check_runs_alone(what: str) -> None:
    """Raise UsageError where a launcher started several processes of what one is enough for."""
    if Ranks.from_environment().world_size > 1:
        raise UsageError(f"{what} runs in one process: start it without torchrun")


def attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """(result, None) or (None, error), the error such as can be sent to another process."""
    try:
        return work(), None
    except (UsageError, RunFailed, Interrupted) as error:
        return None, error
    except OSError as error:
        return None, OSError(error.errno, error.strerror or str(error), error.filename)
    except Exception as error:
        if is_lost_peer(error):
            raise
        return None, RunFailed(traceback.format_exc().strip())


def is_lost_peer(error: Exception) -> bool:
    """Whether torch means that another process is gone or silent; gloo has no exception for it."""
    # gloo's messages begin with its source file, but for the last one: after a timeout. Another
    # kind of error may hold such a word in a path or a name.
    words = ("gloo", "Connection closed by peer", "NCCL", "Timed out waiting", "pair closure")
    names_a_peer = any(word in str(error) for word in words)
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and names_a_peer)


def exit_at_once(status: int) -> NoReturn:
    """End a process among others without the interpreter's clean-up, in which threads of
    torch.distributed at times crash, or wait for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def launch_name() -> str | None:
    """What a launcher's starts and restarts share: torchrun's run id, else its process.

    Its count of restarts is of no use: each machine's launcher counts its own.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id != "none":  # torchrun's word for: none was given
        return run_id
    began = None  # another process of the same number began at another time
    with contextlib.suppress(OSError, IndexError):  # only Linux tells
        stat = Path(f"/proc/{os.getppid()}/stat").read_text(encoding="utf-8")
        began = stat.rsplit(")", 1)[1].split()[19]
    return json.dumps([os.getppid(), platform.node(), began])
