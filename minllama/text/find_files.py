"""Finding text files: the names, folders and globs that flags give, as a list of files."""

from __future__ import annotations

import glob
import itertools
import os
import runpy
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from config import DATA_DIR
from minllama.cli.command_line import has_line_break
from minllama.cli.console import say
from minllama.system.errors import UsageError
from minllama.system.files import check_regular, read_json, real_path
from minllama.system.kinds import HEAD_BYTES, binary_kind, looks_binary
from minllama.system.tables import TABLE_SUFFIXES
from minllama.system.unpacking import compression_of, uncompressed_name

SHOWN_FILES = 10  # of many, named one by one
SHOWN_KINDS = 5  # of the files in a folder that are skipped
TEXT_SUFFIXES = (".txt", ".jsonl", *TABLE_SUFFIXES)
NEARLY_ALL = 0.9  # of a folder's text: what is skipped is what was meant
TRIED_FILES = 5  # of a kind, looked at to see whether they are text
NO_SUFFIX = "without a suffix"


def is_text_name(path: Path) -> bool:
    """Whether a folder's file is read without being named: `a.txt`, `a.jsonl.zst`, `a.parquet`."""
    return uncompressed_name(path).lower().endswith(TEXT_SUFFIXES)


def find_text_files(patterns: Sequence[str | Path], *, flag: str = "--pretrain_data") -> list[Path]:
    """The files that names, folders and globs in `patterns` match: in order, none twice.

    A folder means its .txt, .jsonl, .parquet and Arrow files, also compressed, at any depth,
    sorted; hidden ones, and those of hidden folders in it, are left out, and counted. Raises
    UsageError, naming `flag`, for a pattern that matches nothing or something that is not a file.
    """
    files: dict[str, Path] = {}
    matched: dict[str, list[Path]] = {}
    named: set[str] = set()  # beside the folders, which are not said to skip them
    for pattern in sorted(map(str, patterns), key=os.path.isdir):  # folders last
        matched[pattern] = _expand(pattern, flag, named)
        if not os.path.isdir(pattern):
            named.update(map(real_path, matched[pattern]))
    for pattern in map(str, patterns):
        for path in matched[pattern]:
            if has_line_break(path):
                raise UsageError(f"{flag} {str(path)!r} has a line break in its name: rename it")
            files.setdefault(real_path(path), path)
    if not files:
        raise UsageError(f"{flag}: no file is named")
    return list(files.values())


def _expand(pattern: str, flag: str, named: set[str]) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        return _files_of_folder(path, flag, named)
    if path.exists():
        check_regular(path)
        return [path]
    matches = sorted(map(Path, glob.glob(pattern, recursive=True)))
    files = [p for p in matches if p.is_file()]
    folders = [p for p in matches if p.is_dir()]
    if files and folders and "**" not in pattern:
        count = f"{len(folders):,} folder{'s' * (len(folders) > 1)}"
        say(f"{pattern}: {count} left out ({folders[0]}); a folder that is named is read")
    if not files:
        what = "matches no file" if glob.has_magic(pattern) else "no such file or folder"
        raise UsageError(f"{flag} {pattern}: {what}{download_hint(path)}")
    return files


# ---------------------------------------------------------------------------- folders


def _files_of_folder(folder: Path, flag: str, named: set[str]) -> list[Path]:
    there = sorted(p for p in folder.rglob("*") if p.is_file())
    inside = [p for p in there if not _hidden_part(p, folder)]
    _print_hidden(folder, [p for p in there if is_text_name(p) and _hidden_part(p, folder)])
    files = _without_scratch([p for p in inside if is_text_name(p)])
    skipped = [p for p in inside if not is_text_name(p) and real_path(p) not in named]
    meant = _skipped_text(skipped)
    if not files:
        problem = f"the folder holds no {', '.join(TEXT_SUFFIXES)} file"
        if meant:
            problem += f"; name what else to read, as in {_glob_of(folder, meant, inside)}"
        raise UsageError(f"{flag} {folder}: {problem}")
    unread, read = sum(map(_size, meant)), sum(map(_size, files))
    if unread > NEARLY_ALL * (read + unread):
        raise UsageError(
            f"{flag} {folder}: {len(meant):,} files {_kind_of(meant[0])} are {unread:,} of the "
            f"{read + unread:,} bytes of text in the folder, and would be skipped: "
            f"{_glob_of(folder, meant, inside)} reads them; name {files[0]} and the like if these "
            "alone are meant"
        )
    _print_splits(folder)
    _print_skipped(folder, skipped, _glob_of(folder, meant, inside) if meant else None)
    return files


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _kind_of(path: Path) -> str:
    return path.suffix.lower() or NO_SUFFIX


def _skipped_text(skipped: Sequence[Path]) -> list[Path]:
    """Of the files that a folder's reading skips those of the kind that has the most text."""
    kinds = {}
    for path in skipped:
        kinds.setdefault(_kind_of(path), []).append(path)
    largest = sorted(kinds.values(), key=lambda paths: -sum(map(_size, paths)))
    for paths in largest:
        if all(map(_may_be_text, paths[:TRIED_FILES])):
            return paths
    return []


def _may_be_text(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(64 * HEAD_BYTES)
    except OSError:
        return False
    if compression_of(head) is not None:
        return True  # of what is in it no more is known
    return binary_kind(head, path) is None and not looks_binary(head)


def _glob_of(folder: Path, meant: Sequence[Path], inside: Sequence[Path]) -> str:
    """The narrowest pattern that matches these files of a folder, in quotes for the shell."""
    below = any(path.parent != folder for path in meant)
    base = os.path.join(glob.escape(str(folder)), *(["**"] if below else []), "")
    suffix, start = meant[0].suffix, os.path.commonprefix([path.name for path in meant])
    for name in (f"*{suffix}", f"{glob.escape(start)}*{suffix}", "*"):
        matched = {path for path in inside if path.match(name)}
        if matched == {*meant}:
            break
    return f"'{base}{name}'"


def _without_scratch(files: Iterable[Path]) -> list[Path]:
    """The files but those that `datasets` keeps of earlier work in a folder of `save_to_disk`."""
    kept = []
    for folder, group in itertools.groupby(files, key=lambda path: path.parent):
        saved = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
        kept += [p for p in group if not (saved and p.match("cache-*.arrow"))]
    return kept


def _print_splits(folder: Path) -> None:
    """Say that a data set of several splits is read as a whole."""
    if (folder / "dataset_dict.json").is_file():
        content = read_json(folder / "dataset_dict.json")
        splits = content.get("splits") if isinstance(content, dict) else None
        if isinstance(splits, list) and len(splits) > 1 and all(isinstance(s, str) for s in splits):
            names = ", ".join(splits)[:60]
            say(f"{folder}: all of its splits are read ({names}); {folder / splits[0]} is one")


def _hidden_part(path: Path, folder: Path) -> str | None:
    """The part of a path in a folder that hides it: .git, .ipynb_checkpoints, a Mac's ._a.txt."""
    return next((part for part in path.relative_to(folder).parts if part.startswith(".")), None)


def _print_hidden(folder: Path, hidden: Sequence[Path]) -> None:
    names = sorted({_hidden_part(path, folder) for path in hidden})
    if names:
        shown = ", ".join(names[:SHOWN_KINDS]) + (", ..." if len(names) > SHOWN_KINDS else "")
        files = "1 hidden text file" if len(hidden) == 1 else f"{len(hidden):,} hidden text files"
        say(f"{folder}: {files} left out ({shown}); what is named is read, hidden or not")


def _print_skipped(folder: Path, skipped: Sequence[Path], pattern: str | None) -> None:
    kinds = Counter(map(_kind_of, skipped)).most_common()
    if kinds:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds[:SHOWN_KINDS])
        more = ", ..." if len(kinds) > SHOWN_KINDS else ""
        example = f", as in {pattern}" if pattern else ""
        say(
            f"{folder}: {counts}{more} skipped; a file is read, whatever its suffix, if it is "
            f"named{example}"
        )


# ---------------------------------------------------------------------------- public files


def download_hint(path: Path) -> str:
    """`; COMMAND` to add to the message of a missing file that data/download.py can fetch."""
    try:
        hint = runpy.run_path(str(DATA_DIR / "download.py"))["download_hint"](path)
    except Exception:  # a hint must never hide the message it adds to
        return ""
    return f"; {hint}" if hint else ""
