"""Files are written whole or not at all, and read with their size bounded."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from pathlib import Path

import pytest

from minllama.system import files
from minllama.system.errors import UsageError
from minllama.system.files import (
    JSON_BYTES,
    atomic_folder,
    atomic_write,
    check_writable,
    check_writable_file,
    free_disk,
    read_json,
    read_json_object,
    read_whole,
    remove_temporaries,
    restore_folder,
    size_on_disk,
    sync_folder,
    write_text,
)

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such thing")

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def same_name(monkeypatch) -> str:
    """What makes temporaries' names random is the same each time."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "0123abcd"[: 2 * size])
    return "0123abcd"


def only(*names: str) -> bool:
    return sorted(path.name for path in Path().iterdir()) == sorted(names)


# ---------------------------------------------------------------------------- writing


@pytest.mark.parametrize("when", ["in the block", "in verify"])
@pytest.mark.parametrize("error", [OSError, UsageError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [True, False])
def test_a_write_that_fails_changes_nothing(when, error, existed):
    """Whatever ends it: the old file is as it was, and nothing half-written is left."""
    path = Path("file")
    if existed:
        path.write_bytes(b"old")

    def fail(written: Path) -> None:
        assert written.read_bytes() == b"new"
        raise error("no")

    with pytest.raises(error, match="no"), atomic_write(path, verify=fail) as file:
        file.write(b"new")
        if when == "in the block":
            raise error("no")
    assert only("file") if existed else only()
    assert not existed or path.read_bytes() == b"old"


def test_a_file_appears_only_when_it_is_whole():
    """Its folders are made; until the end the old content is what others read."""
    path = Path("some", "folder", "file")
    write_text(path, "old\n")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old\n"
    assert path.read_bytes() == b"new" and len(list(path.parent.iterdir())) == 1


@posix
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_new_file_obeys_the_umask(mask):
    """Temporaries of the tempfile module are for their owner alone, and so was every file."""
    before = os.umask(mask)
    try:
        write_text(Path("new"), "x")
    finally:
        os.umask(before)
    assert Path("new").stat().st_mode & 0o777 == 0o666 & ~mask


@posix
def test_a_file_that_is_replaced_keeps_its_mode():
    """A file that the user opened to a group stays open to it."""
    write_text(Path("old"), "x")
    for mode in (0o664, 0o600, 0o755):
        Path("old").chmod(mode)
        write_text(Path("old"), "y")
        assert Path("old").stat().st_mode & 0o777 == mode


@posix
def test_links_are_not_followed(same_name):
    """Where others may write, one could lay a link to a file of ours where we write next."""
    Path("victim").write_text("dear", encoding="utf-8")
    Path(f".new.{same_name}.tmp").symlink_to("victim")
    with pytest.raises(FileExistsError):
        write_text(Path("new"), "x")
    Path(f".exported.{same_name}.tmp").symlink_to(".")
    with pytest.raises(FileExistsError), atomic_folder(Path("exported")):
        pass
    Path("target").symlink_to("victim")
    with atomic_write(Path("target")) as file:
        file.write(b"x")
    assert not Path("target").is_symlink() and Path("target").read_bytes() == b"x"
    assert Path("victim").read_text(encoding="utf-8") == "dear"


@pytest.mark.parametrize("kind", ["a file", "a folder"])
def test_what_has_a_name_is_on_the_disk(kind, monkeypatch):
    """A power cut finds it old or new: its bytes are flushed before it is renamed, its name after.

    Also of a folder, whose files are flushed one by one.
    """
    happened, flush, rename = [], os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        happened.append("names" if is_folder else os.fstat(descriptor).st_size)
        flush(descriptor)

    def replace(source: Path, target: Path) -> None:
        happened.append(Path(target).name)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    if kind == "a file":
        write_text(Path("new"), "four")
    else:
        with atomic_folder(Path("new")) as folder:
            (folder / "a").write_bytes(b"four")
    of_folder = [] if kind == "a file" else ["names"]
    expected = [4, *of_folder, "new", "names"]
    assert happened == [what for what in expected if os.name != "nt" or what != "names"]


@posix
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EIO])
def test_a_folder_that_cannot_be_flushed(number, monkeypatch):
    """Some network file systems cannot; a disk that fails is an error as ever."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/dev/fd/{descriptor}") or os.path.samestat(
            os.fstat(descriptor), os.stat(".")
        ):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            write_text(Path("file"), "x")
        with pytest.raises(OSError):
            sync_folder(Path())
    else:
        write_text(Path("file"), "x")
    assert Path("file").read_bytes() == b"x" and only("file")


@pytest.mark.parametrize("times", [1, 4, 9])
def test_windows_lends_a_file_to_a_scanner_for_a_while(times, monkeypatch):
    """There a rename fails while another program has the target open: it is tried again."""
    Path("source").write_bytes(b"x")
    real, calls = os.replace, []

    def replace(*paths: Path) -> None:
        calls.append(paths)
        if len(calls) <= times:
            raise PermissionError(errno.EACCES, "in use")
        real(*paths)

    monkeypatch.setattr(files.os, "replace", replace)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    with monkeypatch.context() as windows:
        windows.setattr(files.os, "name", "nt")
        if times < 5:
            files.replace("source", "target")
        else:
            with pytest.raises(PermissionError):
                files.replace("source", "target")
    assert only("target" if times < 5 else "source")
    calls.clear()
    if os.name != "nt":
        with pytest.raises(PermissionError):  # elsewhere that is how it is
            files.replace("target" if times < 5 else "source", "other")


def test_temporaries_of_killed_processes_are_removed():
    """Those of the named files alone, files or folders, and none that may be being written."""
    mine = [".model.pt.0123abcd.tmp", ".run-1.0123abcd.tmp"]
    others = [
        ".notes.0123abcd.tmp", ".model.pt.123.tmp", ".model.pt.0123ABCD.tmp", "model.pt.tmp",
        ".a.model.pt.0123abcd.tmp", "model.pt",
    ]  # fmt: skip
    for name in (mine[0], *others):
        Path(name).write_bytes(b"half")
    Path(mine[1]).mkdir()
    Path(mine[1], "part").write_bytes(b"half")
    remove_temporaries(Path(), r"model\.pt|run-\d", older_than=60)
    assert only(*mine, *others)
    for name in mine:
        os.utime(name, (time.time() - 100,) * 2)
    remove_temporaries(Path(), r"model\.pt|run-\d", older_than=60)
    assert only(*others)


# ---------------------------------------------------------------------------- folders


def write_folder(path: Path, text: str) -> None:
    with atomic_folder(path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text(text, encoding="utf-8")
        (folder / text).write_text(text, encoding="utf-8")


def content(path: Path) -> dict[str, str]:
    return {
        file.relative_to(path).as_posix(): file.read_text(encoding="utf-8")
        for file in path.rglob("*")
        if file.is_file()
    }


def test_a_folder_is_replaced_whole():
    """No file of the old one is among those of the new; one that fails changes nothing."""
    path = Path("exported")
    for text in ("one", "two"):
        write_folder(path, text)
        assert content(path) == {"inner/file": text, text: text} and only("exported")
    with pytest.raises(OSError, match="no"), atomic_folder(path) as folder:
        (folder / "file").write_text("three", encoding="utf-8")
        raise OSError("no")
    assert content(path) == {"inner/file": "two", "two": "two"} and only("exported")


@pytest.mark.parametrize("number", [1, 2])
def test_a_rename_that_fails_leaves_the_old_folder(number, monkeypatch):
    """The second of the two: the first one's work is undone."""
    path, real, calls = Path("exported"), os.replace, []
    write_folder(path, "one")

    def replace(*paths: Path) -> None:
        calls.append(paths)
        if len(calls) == number:
            raise OSError(errno.EIO, "no")
        real(*paths)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no"):
        patch.setattr(files.os, "replace", replace)
        write_folder(path, "two")
    assert content(path) == {"inner/file": "one", "one": "one"} and only("exported")


class Killed(BaseException):
    """Stands for the end of the process: nothing that follows it is done."""


@pytest.mark.parametrize("renames", [1, 2])
def test_a_folder_whose_replacement_was_killed(renames, monkeypatch):
    """Between the two renames it has no name: it gets that back. Then it is replaced as ever."""
    path, calls, real, real_rmtree = Path("exported"), [], os.replace, shutil.rmtree
    write_folder(path, "one")

    def replace(*paths: Path) -> None:
        if len(calls) == renames:
            raise Killed
        calls.append(paths)
        real(*paths)

    def rmtree(*arguments: Path, **options: bool) -> None:
        if calls:
            raise Killed
        real_rmtree(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(files.os, "replace", replace)
        patch.setattr(files, "restore_folder", lambda path: None)
        patch.setattr(files.shutil, "rmtree", rmtree)
        write_folder(path, "two")
    restore_folder(path)
    text = "one" if renames == 1 else "two"
    assert content(path) == {"inner/file": text, text: text}
    write_folder(path, "three")
    remove_temporaries(Path(), "exported")
    assert content(path) == {"inner/file": "three", "three": "three"} and only("exported")
    restore_folder(path)
    assert content(path)["inner/file"] == "three"


# ---------------------------------------------------------------------------- before writing


def test_a_place_that_cannot_be_written_is_named_with_its_flag():
    """At the start of a run, not after hours of it."""
    check_writable(Path("new", "folder"), "--save_dir")
    assert Path("new", "folder").is_dir() and not list(Path("new", "folder").iterdir())
    Path("file").write_bytes(b"x")
    with pytest.raises(UsageError, match="--save_dir file.*cannot write there"):
        check_writable(Path("file"), "--save_dir")
    with pytest.raises(UsageError, match="--output new: is a folder"):
        check_writable_file(Path("new"), "--output")
    with pytest.raises(UsageError, match="--output"):
        check_writable_file(Path("file", "inside"), "--output")
    check_writable_file(Path("other", "file"), "--output")
    assert Path("file").read_bytes() == b"x" and not Path("other", "file").exists()


@posix
def test_a_write_protected_file_is_named():
    """The folder can be written, so it would have been replaced, against what its mode says."""
    Path("file").write_bytes(b"x")
    Path("file").chmod(0o444)
    if os.access("file", os.W_OK):
        pytest.skip("this user may write everything")
    with pytest.raises(UsageError, match="--output file: is write-protected"):
        check_writable_file(Path("file"), "--output")


def test_free_disk_of_a_folder_to_come():
    """Its disk is that of the nearest folder that exists."""
    assert free_disk(Path("a", "b", "c")) == pytest.approx(shutil.disk_usage(".").free, rel=0.2)


def test_size_on_disk():
    """Of a file, or of all files in a folder and those below it."""
    for name in ("a", "b/c"):
        write_text(Path("folder", name), "xyz")
    assert size_on_disk(Path("folder", "a")) == 3 and size_on_disk(Path("folder")) == 6


# ---------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "not JSON"),  # once a crash of the interpreter
        (b'{"a":' * 100_000, "not JSON"),
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"9" * 10_000, "not JSON"),
        (b'"' + b"x" * 20_000 + b'"', "larger than 10,000 bytes"),
        (b'{"a": "\xff"}', r"not UTF-8 \(byte 7\)"),
    ],
    ids=["nested", "nested open", "cut", "empty", "long number", "large", "not UTF-8"],
)
def test_json_that_is_none_is_one_line(data, message, monkeypatch):
    """What a downloaded folder may hold: named, and not half-understood."""
    if "larger" in message:
        monkeypatch.setattr(files, "JSON_BYTES", 10_000)
    Path("config.json").write_bytes(data)
    with pytest.raises(UsageError, match=f"config.json: {message}") as error:
        read_json(Path("config.json"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_json_as_other_programs_write_it():
    """With the mark that Windows editors put first; an object where one is asked for."""
    Path("a.json").write_bytes(b'\xef\xbb\xbf{"a": [1, "\xc3\xa4"]}')
    assert read_json_object(Path("a.json")) == {"a": [1, "ä"]}
    Path("b.json").write_bytes(b"[1]")
    assert read_json(Path("b.json")) == [1]
    with pytest.raises(UsageError, match="b.json: a JSON object was expected, not list"):
        read_json_object(Path("b.json"))


def test_what_is_no_file_is_not_read():
    """A pipe would be waited for, for ever."""
    Path("folder").mkdir()
    with pytest.raises(UsageError, match="folder: is a folder"):
        read_json(Path("folder"))
    with pytest.raises(UsageError, match="missing: no such file"):
        read_json(Path("missing"))
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe")
        with pytest.raises(UsageError, match="pipe: not a regular file"):
            read_json(Path("pipe"))


def test_a_file_is_read_up_to_a_bound():
    """A sparse file of gigabytes takes nothing on the disk, and filled the memory."""
    Path("a").write_bytes(b"123")
    assert read_whole(Path("a"), 3) == b"123"
    with pytest.raises(UsageError, match="a: larger than 2 bytes"):
        read_whole(Path("a"), 2)
    with Path("sparse.json").open("wb") as file:
        file.truncate(JSON_BYTES + 1)
    with pytest.raises(UsageError, match="sparse.json: larger than 67,108,864 bytes"):
        read_json(Path("sparse.json"))
