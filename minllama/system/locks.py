"""Locks that one process at a time holds: on a run's folder, or a cache that is being built.

The system locks an open file, so that a process that dies leaves no lock behind.
"""

from __future__ import annotations

import contextlib
import os
import platform
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from minllama.system.files import check_regular

LOCKED_BYTE = 1 << 20  # beyond the file's end: on Windows others cannot read a locked byte


class Busy(Exception):
    """Another process holds the lock; the message names it."""


@dataclass(frozen=True)
class Lock:
    """A lock that this process holds."""

    path: Path
    content: str  # of the file: process, machine and a random id
    stat: os.stat_result

    def is_gone(self) -> bool:
        """Whether the file, or the folder around it, was removed, renamed or replaced."""
        try:
            return not os.path.samestat(self.stat, self.path.stat())
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:  # of a network file system that hangs: no reason to end a run
            return False

    def remove(self) -> None:
        """Remove the file, unless another one has its place."""
        if not self.is_gone():
            with contextlib.suppress(OSError):  # Windows does not remove an open file
                self.path.unlink()


@contextlib.contextmanager
def hold(path: Path, *, remove: bool = False) -> Iterator[Lock]:
    """Hold an exclusive lock on a file, which says who holds it; `remove` the file at the end.

    On a file system without locks prints a note and holds none. Raises Busy, UsageError for what is
    no file, and OSError where it cannot be opened.
    """
    with contextlib.ExitStack() as opened:
        lock = _try_to_hold(path, opened)
        while lock.is_gone():  # its last holder removed it between our opening and locking it
            lock = _try_to_hold(path, opened)
        try:
            yield lock
        finally:
            if remove:
                lock.remove()


def _try_to_hold(path: Path, opened: contextlib.ExitStack) -> Lock:
    if path.exists():
        check_regular(path)
    flags = os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor, mode = os.open(path, flags | os.O_RDWR, 0o666), "r+b"
    except PermissionError:  # another user's file: it can be locked if it can be read
        descriptor, mode = os.open(path, flags | os.O_RDONLY), "rb"
    file = opened.enter_context(os.fdopen(descriptor, mode))
    try:
        _lock(file)
    except (BlockingIOError, PermissionError):
        pid, host, *_ = [*file.read(200).decode("utf-8", "replace").split(), "?", "?"]
        raise Busy(f"process {pid} on {host}") from None
    except OSError as error:  # some network file systems have no locks
        print(f"note: {path} cannot be locked ({error.strerror}): let no other run write there")
    content = f"{os.getpid()} {platform.node()} {uuid.uuid4().hex}"
    if file.writable():
        file.truncate(0)
        file.write(content.encode())
        file.flush()
    return Lock(path, content, os.fstat(file.fileno()))


def _lock(file: BinaryIO) -> None:
    if os.name == "nt":
        import msvcrt

        os.lseek(file.fileno(), LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        os.lseek(file.fileno(), 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
