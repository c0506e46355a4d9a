"""Several processes as one run: who they are, what they do together, and noticing who is gone.

A method that all ranks take part in has to be called by every rank, in the same order; alone it
costs nothing. Knows nothing of models: `minllama.machine.sharding` distributes those.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import platform
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from minllama.system.errors import Interrupted, RunFailed, UsageError
from minllama.system.signals import StopRequest

T = TypeVar("T")
SAY_WITHIN = 2.0  # seconds in which ranks that miss others say so
LAUNCHER_GONE = "the launcher of this process ended without it"
SIGN_OF_LIFE = 1.0  # seconds between the signs that a rank with long work gives


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run, as torchrun describes it in the environment.

    A rank that waits in vain raises torch's RuntimeError, which `is_lost_peer` recognises.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    node: int = 0
    nodes: int = 1
    launch: str | None = None  # names the launcher, the same for all its restarts; None: none
    parent: int | None = field(default=None, compare=False)  # the launcher's process
    timeout: int = 600  # seconds without a sign of life after which another process is lost
    calls: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)

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

        world_size = number("WORLD_SIZE", 1)
        if world_size == 1:  # then a RANK that something else has set means nothing
            return cls(launch=launch_name(), parent=launcher_process(), timeout=timeout)
        if not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise UsageError(
                f"WORLD_SIZE={world_size} is set without RANK, MASTER_ADDR and MASTER_PORT: start "
                "several processes with torchrun, or unset it"
            )
        return cls(
            rank=number("RANK", 0),
            world_size=world_size,
            local_rank=number("LOCAL_RANK", 0),
            node=number("GROUP_RANK", 0),
            nodes=number("GROUP_WORLD_SIZE", 1),
            launch=launch_name(),
            parent=launcher_process(),
            timeout=timeout,
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
    def connected(self, *, use_gpu: bool) -> Iterator[None]:
        """Join the other processes within the block, and let rank 0 alone print."""
        if self.world_size == 1:
            yield
            return
        backend = "cpu:gloo,cuda:nccl" if use_gpu and torch.cuda.is_available() else "gloo"
        limit = timedelta(seconds=self.timeout)
        store = next(dist.rendezvous("env://", self.rank, self.world_size, timeout=limit))[0]
        store = dist.PrefixStore(self._start_name(store), store)
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.world_size, timeout=limit
        )
        with contextlib.ExitStack() as stack:
            if not self.is_main:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield
        dist.destroy_process_group()  # not after an error: it would wait for those who are gone

    def _start_name(self, store: dist.Store) -> str:
        """A name that the processes of this start share, and those of no other.

        A launcher that restarts a run keeps its store, with the addresses of the dead in it. So
        each rank leaves a mark of its own, and rank 0 lists the marks it sees; once every rank has
        found its own in the list and said so, they are those of the living. Raises RunFailed.
        """
        mark, deadline = uuid.uuid4().hex, time.monotonic() + self.timeout
        others = range(self.world_size)
        store.set(f"mark {self.rank}", mark)
        while time.monotonic() < deadline:
            if self.is_main:
                if store.check([f"mark {other}" for other in others]):
                    marks = [store.get(f"mark {other}").decode() for other in others]
                    store.set("marks", " ".join(marks))
                    if store.check([f"{mark} sees {other}" for other in marks[1:]]):
                        store.set("start", " ".join(marks))
                        return mark
            elif store.check(["marks"]):
                marks = store.get("marks").decode().split()
                if marks[self.rank] == mark:
                    store.set(f"{marks[0]} sees {mark}", "")
                    if store.check(["start"]) and mark in store.get("start").decode():
                        return marks[0]
            time.sleep(0.02)
        raise RunFailed(
            f"not all of {self.world_size} processes came within --dist_timeout {self.timeout} "
            "seconds"
        )

    # ------------------------------------------------------------------------ numbers and values

    def sum(self, *values: float) -> list[float]:
        """The sum of each number over all ranks."""
        return self.sum_array(np.array(values, np.float64)).tolist()

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
        dist.all_gather_into_tensor(numbers, own)
        return numbers.view(self.world_size, -1).tolist()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, plain or tensors on the CPU, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
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
        """Do something on every rank; what one of them raises, all do."""
        if self.world_size == 1:
            return work()
        value, error = attempt(work)
        for failed in self.gather(error):
            if failed is not None:
                raise failed
        return value

    def on_main(
        self, work: Callable[[], T], *, tell: Callable[[T], Any] = lambda value: value
    ) -> T:
        """Do something on rank 0 alone, however long; what it returns or raises, all do.

        Ranks other than 0 return what `tell` makes of it, where not all of it is to be sent.
        """
        if self.world_size == 1:
            return work()
        if self.launcher_is_gone():  # and with it the store through which the others would learn
            return work() if self.is_main else None
        name = f"work {next(self.calls)} of rank 0"
        if not self.is_main:
            return self.follow(name)
        kept: list[T] = []

        def work_and_tell() -> Any:
            kept.append(work())
            return tell(kept[0])

        self.lead(name, work_and_tell)
        return kept[0]

    def first_on_node(self, work: Callable[[], T], *, then: Callable[[], T]) -> T:
        """Do something long on one process of each machine, and `then` on the others what is quick
        once that is done."""
        if self.world_size == 1:
            return work()
        name = f"work {next(self.calls)} of machine"
        results: list[T] = []  # which stay here: they may be larger than what is sent to others
        if self.local_rank == 0:
            with contextlib.suppress(UsageError, RunFailed, Interrupted, OSError):  # raised below
                self.lead(f"{name} {self.node}", lambda: results.append(work()))
        for node in range(self.nodes):
            self.follow(f"{name} {node}")
        return results[0] if results else then()

    def lead(self, name: str, work: Callable[[], T]) -> T:
        """Do the work that others follow, with a sign of life every second."""
        store, done = run_store(), threading.Event()

        def give_signs() -> None:
            with contextlib.suppress(RuntimeError):  # the launcher is gone
                while not done.wait(SIGN_OF_LIFE):
                    store.add(f"{name} lives", 1)

        thread = threading.Thread(target=give_signs, daemon=True)
        thread.start()
        try:
            outcome = attempt(work)
        finally:
            done.set()
            thread.join()
        # Pickled between the processes of one run, as torch's own collectives do; never in a file.
        store.set(f"{name} ends", pickle.dumps(outcome))
        return self.follow(name)

    def follow(self, name: str) -> Any:
        """Wait for the work that another rank leads; returns or raises what that did."""
        store = run_store()
        signs, since = -1, time.monotonic()
        while not store.check([f"{name} ends"]):
            found = store.add(f"{name} lives", 0)
            if found != signs:
                signs, since = found, time.monotonic()
            if time.monotonic() - since > self.timeout:
                raise RunFailed(
                    f"no sign of life from {name} for --dist_timeout {self.timeout} seconds"
                )
            time.sleep(0.02)
        value, error = pickle.loads(store.get(f"{name} ends"))
        if error is not None:
            raise error
        return value

    # ------------------------------------------------------------------------ errors

    def is_to_say(self, message: str) -> bool:
        """Whether this process prints an error: of those that have the same one, the first."""
        if self.world_size == 1 or not dist.is_initialized() or self.launcher_is_gone():
            return self.is_main  # the launcher has the store; that it is gone all know
        try:
            store = run_store()
            store.add("errors", 1)
            return store.add(f"error {hashlib.sha256(message.encode()).hexdigest()}", 1) == 1
        except RuntimeError:  # the launcher is gone
            return True

    def lost_peer(self) -> str | None:
        """What to say of processes that ended or hang; None where one of them said why."""
        missing = "another process"
        with contextlib.suppress(RuntimeError, ValueError):  # no launcher, or not any more
            store = run_store()
            store.add(f"misses others {self.rank}", 1)
            time.sleep(SAY_WITHIN)  # until those whose fault it is not have said the same
            if store.add("errors", 0):
                return None
            names = range(self.world_size)
            lost = [str(rank) for rank in names if not store.add(f"misses others {rank}", 0)]
            missing = f"rank {' and '.join(lost)}" if lost else missing
        return (
            f"{missing} of {self.world_size} ended, or did not answer for --dist_timeout "
            f"{self.timeout} seconds, so all end; --resume auto continues from the last checkpoint"
        )


def run_store() -> dist.Store:
    """The key-value store of the run's processes: notes that the others need not wait for."""
    return dist.distributed_c10d._get_default_store()


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
    words = ("gloo", "Connection closed by peer", "NCCL", "Timed out waiting")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def exit_at_once(status: int) -> NoReturn:
    """End a process among others without the interpreter's clean-up, in which threads of
    torch.distributed at times crash, or wait for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def launcher_process() -> int | None:
    """The process of torchrun that started this one; None: another program did."""
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


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
