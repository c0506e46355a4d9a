"""Files written whole or not at all, and read up to a size.

Every file of this program is written through `atomic_write`, or a folder through `atomic_folder`:
into a temporary beside the target, which is flushed to the disk and then renamed. Knows nothing of
their content.
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
JSON_BYTES = 64 << 20  # far more than a JSON file of ours or of Hugging Face has
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # some network file systems cannot


# ---------------------------------------------------------------------------- writing


@contextlib.contextmanager
def atomic_write(
    path: Path, *, verify: Callable[[Path], object] | None = None
) -> Iterator[BinaryIO]:
    """A file to fill within the block, then flushed, verified and renamed to `path`.

    After any failure `path` is as it was and the temporary is gone; a killed process leaves one,
    for `remove_temporaries`. A file that is replaced keeps its mode. Raises OSError, and what
    `verify` raises, which is called with the path of the flushed file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(path)
    file = temporary.open("x+b")  # exclusive: a link that somebody left there is not followed
    try:
        with file:
            if os.name != "nt" and path.is_file():
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
            if verify is not None and hasattr(os, "posix_fadvise"):  # read the disk, not the cache
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if verify is not None:
            verify(temporary)
        replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # must not hide the first error
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, its line ends unchanged, whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill within the block, then renamed to `path`, whose old folder it replaces.

    Before reading `path` call `restore_folder`, which undoes a replacement that was killed between
    its two renames.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _temporary_beside(path), _replaced_folder(path)
    restore_folder(path)
    shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed after both renames
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
    """Put the old folder back that a killed `atomic_folder` had moved aside."""
    old = _replaced_folder(path)
    if old.is_dir() and not path.exists():
        replace(old, path)


def _replaced_folder(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def remove_temporaries(folder: Path, names: str, *, older_than: float = 0) -> None:
    """Delete killed processes' temporaries of files whose names match the regular expression.

    Those younger than `older_than` seconds stay: another process may be writing them.
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
    """os.replace, tried again on Windows, where a virus scanner may hold the target open."""
    for pause in (0.05, 0.2, 0.5, 1.0, None):
        try:
            return os.replace(source, target)
        except PermissionError:
            if os.name != "nt" or pause is None:
                raise
            time.sleep(pause)


def sync_folder(folder: Path) -> None:
    """Flush a rename within the folder to the disk, where the file system can."""
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
    """Create `folder` and write a byte in it; raises UsageError that names the flag."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise UsageError(f"{flag} {folder}: cannot write there ({error.strerror})") from None


def check_writable_file(path: Path, flag: str) -> None:
    """Raise UsageError, naming the flag, if a file to be written later could not be."""
    if path.is_dir():
        raise UsageError(f"{flag} {path}: is a folder; name a file")
    check_writable(path.parent, flag)
    if path.exists() and not os.access(path, os.W_OK):
        raise UsageError(f"{flag} {path}: is write-protected; name another file")
    temporary = _temporary_beside(path)  # the longest name that will be written
    try:
        temporary.touch(exist_ok=False)
        temporary.unlink()
    except OSError as error:
        raise UsageError(
            f"{flag} {path}: cannot be written ({error.strerror}): give it, or the data that it is "
            "named after, another name"
        ) from None


def free_disk(folder: Path) -> int:
    """Bytes free on the disk of `folder`, or of the nearest parent that exists."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


# ---------------------------------------------------------------------------- reading


def real_path(path: Path) -> str:
    """The path without links, the same for all paths to a file.

    Unlike Path.resolve, which up to Python 3.12 raises for links in a circle.
    """
    return os.path.realpath(path)


def is_text(path: str | Path) -> bool:
    """Whether a path or name is text; a zip of another encoding has bytes, read as surrogates."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def check_regular(path: Path) -> None:
    """Raise UsageError unless `path` is a file: opening a pipe could block for ever."""
    if path.is_dir():
        raise UsageError(f"{path}: is a folder, not a file")
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    if not path.is_file():
        raise UsageError(f"{path}: not a regular file (a pipe or a device)")


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """A file to read within the block; raises UsageError for what is none, or cannot be read."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_whole(path: Path, most: int) -> bytes:
    """The bytes of a file that may have `most` of them; raises UsageError.

    Without a bound a sparse file, which takes nothing on the disk, fills the memory.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise UsageError(f"{path}: larger than {most:,} bytes, which no such file is")
    return data


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises UsageError, naming the file, for what is none."""
    data = read_whole(path, JSON_BYTES)
    try:
        return json.loads(data.decode("utf-8-sig"))
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
