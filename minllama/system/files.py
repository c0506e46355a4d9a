"""Files written whole or not at all, and read with their size bounded.

Every file that this program writes goes through `atomic_write` (or a folder through
`atomic_folder`): a temporary beside the target, flushed to the disk, then renamed. Knows nothing of
what the files hold.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from minllama.system.errors import UsageError

READ_BYTES = 1 << 20
JSON_BYTES = 64 << 20  # a JSON file of ours or Hugging Face's is far smaller
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # some network file systems cannot


# ---------------------------------------------------------------------------- writing


@contextlib.contextmanager
def atomic_write(
    path: Path, *, verify: Callable[[Path], object] | None = None
) -> Iterator[BinaryIO]:
    """A file to fill within the block; at its end it is flushed, verified and renamed to `path`.

    On any failure the temporary is removed and `path` is as it was; killed, it leaves a temporary
    that `remove_temporaries` finds. A file that is replaced keeps its mode. Raises OSError, and
    what `verify`, which is given the flushed file's path, raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(path)
    file = temporary.open("x+b")  # exclusive: never follows a link that somebody left there
    try:
        with file:
            if os.name != "nt" and path.is_file():
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
            if verify is not None and hasattr(os, "posix_fadvise"):  # it shall read from the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if verify is not None:
            verify(temporary)
        replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # a failing disk must not hide what failed first
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with Unix line ends, whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill within the block; at its end it takes the name `path`.

    A folder of that name is replaced: call `restore_folder` before looking at it, which undoes a
    replacement that was killed between its two renames.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _temporary_beside(path), _replaced_folder(path)
    restore_folder(path)
    shutil.rmtree(old, ignore_errors=True)  # of one that was killed after both
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
        sync_folder(temporary)
        if path.exists():
            replace(path, old)
        replace(temporary, path)
    finally:
        restore_folder(path)
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(path: Path) -> None:
    """Put back the folder that a killed `atomic_folder` had moved aside."""
    old = _replaced_folder(path)
    if old.is_dir() and not path.exists():
        replace(old, path)


def _replaced_folder(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def remove_temporaries(folder: Path, names: str, *, older_than: float = 0) -> None:
    """Delete what killed processes left of files whose names match the regular expression `names`.

    `older_than` seconds spares files that another process may be writing.
    """
    pattern = re.compile(rf"\.(?:{names})\.[0-9a-f]{{8}}\.tmp")
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if pattern.fullmatch(path.name) and time.time() - path.stat().st_mtime >= older_than:
                remove(path)


def remove(path: Path) -> None:
    """Delete a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def replace(source: Path, target: Path) -> None:
    """os.replace, tried again where Windows says that a scanner or indexer holds the target."""
    for pause in (0.05, 0.2, 0.5, 1.0, None):
        try:
            return os.replace(source, target)
        except PermissionError:
            if os.name != "nt" or pause is None:
                raise
            time.sleep(pause)


def sync_folder(folder: Path) -> None:
    """Flush a rename to the disk, where the system and the file system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------- before writing


def check_writable(folder: Path, flag: str) -> None:
    """Make `folder` and write a byte into it; raises UsageError that names the flag."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise UsageError(f"{flag} {folder}: cannot write there ({error.strerror})") from None


def check_writable_file(path: Path, flag: str) -> None:
    """Raise UsageError, naming the flag, where a run could not write the file at its end."""
    if path.is_dir():
        raise UsageError(f"{flag} {path}: is a folder; name a file")
    check_writable(path.parent, flag)
    if path.exists() and not os.access(path, os.W_OK):
        raise UsageError(f"{flag} {path}: is write-protected; name another file")


def free_disk(folder: Path) -> int:
    """Bytes free on the disk of `folder`, or of the nearest parent that exists."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


# ---------------------------------------------------------------------------- reading


def real_path(path: Path) -> str:
    """Where a path leads in the end; unlike Path.resolve, also of links that go round in a circle.

    Two paths that lead to the same file have the same.
    """
    return os.path.realpath(path)


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def check_regular(path: Path) -> None:
    """Raise UsageError unless `path` is a file: to open a pipe would wait for ever."""
    if path.is_dir():
        raise UsageError(f"{path}: is a folder, not a file")
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    if not path.is_file():
        raise UsageError(f"{path}: not a regular file (a pipe or a device)")


def read_bounded(path: Path, most: int) -> str:
    """A UTF-8 file of at most so many bytes; raises OSError, and ValueError for any other."""
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"larger than {most:,} bytes")
    return data.decode("utf-8-sig")


def read_json(path: Path) -> Any:
    """The content of a JSON file of bounded size; UsageError that names the file for any other."""
    check_regular(path)
    try:
        return json.loads(read_bounded(path, JSON_BYTES))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 (byte {error.start:,})") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON ({error})") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises UsageError."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path}: a JSON object was expected, not {type(content).__name__}")
    return content
